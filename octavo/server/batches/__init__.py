"""Batches: files of requests that are run below all others, and files of what they came to.

runner    which batches this process works on; what is over, or nobody's any more
worker    the life of one batch: its lines are checked, run, and written out
slots     how many lines run at once
lines     an input file, line by line
calls     one line through the code of its route
outputs   the files of results and of errors
records   batches in the store: who works on which, and what became of each line
"""
