"""The experts of MoE layers: routing, the products of the chosen experts, and their sum.

| tokens | how a program finds its rows | file |
| --- | --- | --- |
| one (two where experts are many) | it has a pair | pairs.py, which sums too |
| few (FEW_TOKENS) | it looks through all pairs; a shared expert is some experts more | grouped.py |
| more, or any deterministic | it has a block of pairs that sort.py has ordered | grouped.py |

Deterministic steps take grouped.py throughout: both of its ways give the same bits. choose.py
chooses, and choose_packed.py where weights are packed; shapes.py has the launch shapes. The parts
of few and more are summed by combine.py, unless the next norm does it; biases of the last products
are added by biases.py, but for those that hopper/ring.py adds.

Packed weights: on Hopper hopper/fp8.py where FP8 meets FP8, and hopper/ring.py for the formats and
sizes that it takes; else packed_pairs.py for pairs.py, fp8.py for many rows of FP8, and unpacked.py
for very many of other formats, and for all where blocks lie as files have them.

Softmax and top k alone are routed by route.py, for one token within the router's product
(product/norm_matvec.py); every other rule by route_by_rule.py.
"""
