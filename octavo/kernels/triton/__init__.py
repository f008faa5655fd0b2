"""The Triton back end: the ops of `octavo.kernels.ops` on a GPU, or on the interpreter.

| room | what | where it is chosen |
| --- | --- | --- |
| attention/ | grouped-query attention, and its KV | attention/choose.py |
| latent/ | latent attention (MLA) | |
| product/ | dense products, with the norm before them | product/choose.py |
| experts/ | routing, and the experts of a layer | experts/choose.py |
| sampling/ | penalties, thresholds, draws | |
| small/ | norms, the embedding, activations | |
| tiles/ | device functions that launch nothing: what kernels are made of | |
| launching/ | how kernels are built and launched | |
| tuning/ | launch shapes: measured, kept, looked up | |

Each room's docstring has its table: which kernel serves which case. `backend.py` is what the
registry builds; it computes nothing itself.
"""
