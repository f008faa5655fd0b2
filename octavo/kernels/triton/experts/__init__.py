"""The experts of MoE layers: routing, sorting, the grouped products, and their sum.

Softmax and top k alone are routed by route.py, for one token within the router's product; every
other rule by route_by_rule.py.
"""
