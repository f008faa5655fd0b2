"""Device functions that launch nothing: the pieces of which kernels are made.

| piece | file |
| --- | --- |
| a tile of a weight, in any format | weight.py |
| which tile a program computes | grid.py |
| online softmax, and the merge of its parts | softmax.py |
| which keys a query sees | visible.py |
| gated activations | activation.py |
"""
