"""Paged attention: the keys' and values' way into the cache, and every way to attend them."""
