"""Attention on Hopper: tensor memory engine and warp-group products, in Gluon."""
