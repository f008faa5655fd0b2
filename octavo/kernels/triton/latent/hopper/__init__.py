"""Latent attention on Hopper: tensor memory engine and warp-group products, in Gluon.

chunks.py has short chunks and shared prefixes, lone.py single queries, tiles.py the way of one tile
through products and softmax.
"""
