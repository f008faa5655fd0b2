"""What clients leave with the server: responses, files, batches; see `store.Store`.

store     the interface: put, get, update, delete, list, by kind, tenant and id
objects   the same within one transaction, for those that change several things at once
bounds    how much there may be, of one tenant and in all
schema    the tables, and the numbers that triggers keep of them
database  one SQLite file, one thread of this process that speaks to it
    failures  what clients are told when the disk fails them
"""
