"""Paged attention: the keys' and values' way into the cache, and every way to attend them.

| queries of a sequence | Hopper, 16 bits, heads of 64 or 128, all visible | else |
| --- | --- | --- |
| one | decode.py: rotation within, keys in splits | the same |
| one, many blocks shared | hopper/ for all members at once, decode.py for tails | shared.py |
| few (SHORT_QUERIES) | hopper/, keys in splits that short_chunks.py plans and merges | tiles.py |
| more | hopper/, keys in one run | tiles.py |
| any, deterministic | decode.py: a row a query, splits of its own | the same |
| all, before: rotation, and the write | write.py | the same |

choose.py is the only place that chooses. splits.py says how many splits there are, rows.py what
kernels of single queries do alike, single_rows.py what their launches are given, partials.py keeps
and merges what splits leave, groups.py finds the sequences that share blocks, prompts.py plans
those of them that compute prompts. planes.py says how keys and values lie; in formats with scales
they are served by hopper/lone.py (single queries), by the portable kernels, or unpacked before
(unpack.py).
"""
