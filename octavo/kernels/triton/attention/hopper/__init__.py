"""Attention on Hopper: tensor memory engine and warp-group products, in Gluon.

kernel.py has the kernel and its launches, pieces.py what a program takes up next, tiles.py the way
of one tile through products and softmax. Gluon cannot call Triton's functions, so that tiles/ is
not for it.
"""
