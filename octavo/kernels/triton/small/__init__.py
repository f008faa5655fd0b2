"""Kernels of one pass over rows, whatever the number of tokens.

| op | file |
| --- | --- |
| RMSNorm, with the residual's addition and the sum of an expert layer's parts | norm.py |
| the same, its rows made FP8; rows made FP8 | norm_quantize.py, quantize.py |
| rows of the embedding | embedding.py |
| rows times a Hadamard matrix | mixing.py |
| gated activations, a shared expert's gated addition | activation.py |
"""
