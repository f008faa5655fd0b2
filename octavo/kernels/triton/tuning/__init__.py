"""Launch shapes: measured by `octavo tune` (tune.py), kept in files and looked up before a launch
(shapes.py). Without a file the heuristics of product/shapes.py and experts/shapes.py decide.
"""
