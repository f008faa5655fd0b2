"""The experts of MoE layers: routing, sorting, the grouped products, and their sum."""
