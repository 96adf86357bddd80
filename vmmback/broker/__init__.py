"""The broker: keeps prefaulted secret RAM ready, and lends it to other processes. docs/BROKER.md.

The way of the data: config.py (who may have what, what is kept ready) -> pool.py (fresh descriptors, never lent) ->
ledger.py (what is lent, to whom) -> lending.py (both, kept together) -> service.py (Varlink) -> client.py, in the
process that borrows.
"""
