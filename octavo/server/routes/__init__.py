"""Route modules, one a family of endpoints; each has a `router`."""
