"""How kernels are built and launched.

| question | file |
| --- | --- |
| which binary is it, without asking Triton's front end | launchable.py |
| where are a launch's descriptors | tensor_maps.py |
| how are all of them built before the first request | building.py |
| when may a kernel's programs come, and when do they begin | overlap.py |
| which program is the last of its launch | tickets.py |
| which GPU and Triton is this | chip.py |
| in which numbers is multiplied | numbers.py |
"""
