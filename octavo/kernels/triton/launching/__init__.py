"""How kernels are launched: built once, early on Hopper, and which program ends last."""
