"""Dense products with packed weights on Hopper (ring.py)."""
