"""Latent attention (MLA): which kernel attends which rows.

| rows | form | file |
| --- | --- | --- |
| one query | absorbed: latent vectors as they lie in the pages | decode.py |
| one query, shared blocks | absorbed, all members at once, tails by decode.py | shared.py |
| few queries | absorbed, keys in splits; merged by attention/short_chunks.py | tiles.py |
| many queries | expanded: keys and values of each head, made once a step | tiles.py |
| all | norm, rotation and the page's row; products of heads | write.py |

pages.py says how vectors lie; in formats with scales the expanded form has them unpacked by
unpack.py, the others in registers.
"""
