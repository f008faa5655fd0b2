"""Octavo under servers and clusters of others: each in a package of its own, which alone imports
them. Nothing else of Octavo imports from here."""
