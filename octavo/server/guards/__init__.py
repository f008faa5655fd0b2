"""Guards: what is asked before a text goes to the model and before its answer goes out.

load      makes the gate of a server from its options
gate      asks the guard: so many at once, so long, and what is done when it does not answer
endpoint  a guard behind HTTP
call      the guard of one call of the API
inputs    the texts of a body, shown and perhaps rewritten
outputs   an answer on its way, held back until it is allowed
"""
