"""Dense products.

| rows | sum | file |
| --- | --- | --- |
| one | in registers; with the norm before it where there is one | norm_matvec.py, else matvec.py |
| up to SKINNY_TOKENS | tiles, a few rows of a weight split | linear.py |
| more | the vendor's library; odd weights and mixed formats in tiles | torch.mm, linear.py |
| any, deterministic | tiles, one order | linear.py |

choose.py is the only place that chooses, shapes.py has the launch shapes. matrices.py makes one
matrix of weights that lie side by side.
"""
