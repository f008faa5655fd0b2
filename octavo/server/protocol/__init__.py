"""Request types of the API, by family."""
