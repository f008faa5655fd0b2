"""Dense products.

| rows | sum | file |
| --- | --- | --- |
| one | in registers; with the norm before it where there is one | norm_matvec.py, else matvec.py |
| up to SKINNY_TOKENS | tiles, a few rows of a weight split | linear.py |
| more | the vendor's library; odd weights and mixed formats in tiles | torch.mm, linear.py |
| any, deterministic | tiles, one order | linear.py |

Packed weights: packed.py; on Hopper hopper/ring.py for more than one row, up to UNPACKED_TOKENS,
and for one of formats with factors by blocks; fp8.py where many rows meet FP8 with a scale a row.

choose.py is the only place that chooses, shapes.py has the launch shapes. matrices.py makes one
matrix of weights that lie side by side.
"""
