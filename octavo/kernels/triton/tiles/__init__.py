"""Device functions that launch nothing: the pieces of which kernels are made.

| piece | file |
| --- | --- |
| a tile of a weight, in any format | weight.py |
| a tile of keys or values, in any format | kv.py, numbers.py |
| vectors on their way into the KV cache | kv_write.py |
| which tile a program computes | grid.py |
| online softmax, and the merge of its parts | softmax.py |
| which keys a query sees | visible.py |
| gated activations | activation.py |
| on Hopper: rings of codes, sums over programs, products of FP8 and what ends them | hopper/ |
"""
