"""Latent attention on Hopper: tensor memory engine and warp-group products, in Gluon.

chunks.py has short chunks and shared prefixes, lone.py single queries, few_heads.py those of many
sequences with few heads, tiles.py the way of one tile through products and softmax, seesaw.py that
of many in a row.
"""
