"""Choosing tokens on the device, in this order:

| step | for | file |
| --- | --- | --- |
| masks and biases on logits, in place | rows held to some ids | restrict.py |
| penalties on logits, in place | rows that ask for some | penalties.py |
| the least logit that top_k, top_p and min_p leave | rows that ask for one | thresholds.py |
| one draw a row, or the best | every row | draw.py |

What the kernels know of a row is `params.ROW_PARAMS`. Nothing waits for the device, and the bits of
a row never depend on its neighbours: every kernel has one variant, sums in an order that the row's
length alone decides, and branches by row.
"""
