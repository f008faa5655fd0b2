"""Latent attention (MLA): which kernel attends which rows.

| rows | form | file |
| --- | --- | --- |
| one query | absorbed: latent vectors as they lie in the pages | decode.py, hopper/ |
| one query, shared blocks | absorbed, all members at once, tails by decode.py | shared.py |
| few queries | absorbed, keys in splits; merged by attention/short_chunks.py | tiles.py |
| many queries | expanded: keys and values of each head, made once a step | tiles.py |
| all | norm, rotation and the page's row; products of heads | write.py, heads.py |

pages.py says how vectors lie; the expanded form has them side by side, unpacked, by unpack.py, the
others unpack formats with scales in registers.
"""
