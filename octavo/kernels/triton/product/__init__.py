"""Dense products.

| rows | sum | file |
| --- | --- | --- |
| one | in registers; with the norm before it where there is one | norm_matvec.py, else matvec.py |
| up to SKINNY_TOKENS | tiles, a few rows of a weight split | linear.py |
| more | the vendor's library; odd weights and mixed formats in tiles | torch.mm, linear.py |
| any, deterministic | tiles, one order | linear.py |

Packed weights: packed.py; on Hopper hopper/ring.py for more than one row, up to UNPACKED_TOKENS,
and for one of formats with factors by blocks. Many rows become FP8 for FP8 weights: fp8.py where
those have a scale a row, on Hopper hopper/fp8.py where they have one for 128 x 128.

choose.py is the only place that chooses, shapes.py has the launch shapes. matrices.py makes one
matrix of weights that lie side by side.
"""
