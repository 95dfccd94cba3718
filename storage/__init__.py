"""Everything the broker keeps on disk.

    errors      the root of the project's errors, and those of this package
    values      Python values to CBOR and back, by an allow-list
    database    opening SQLite the one way it is opened here; its invariants D1 to D6
    migrations  the schemas, append-only
    directory   the data directory: lock, token, number of shards
    registry    connections, their tags and state (the gateway's)
    shards      what rooms put, get and list (the hosts')
    alarms      when rooms are to be woken
    crons       which ticks have been run
    writer      the long-lived thread that commits

Knows nothing of sockets, rooms' code or trio: bytes and rows in, bytes and rows out. `hibernation` and
`broker` import its modules by name; it imports neither.
"""

__all__ = [
    "alarms",
    "crons",
    "database",
    "directory",
    "errors",
    "migrations",
    "registry",
    "shards",
    "values",
    "writer",
]
