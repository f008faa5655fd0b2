"""Who may do what, and how much of it: keys, tokens, scopes, tenants and their limits.

`callers` has the words, `route_scopes` the one table of routes, `keyring` finds who sent a request.
Called by `auth` and by the routes' code; never speaks to the engine.
"""
