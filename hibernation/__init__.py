"""The life of rooms: waking, turns, eviction, and the processes they run in.

    errors         what users' code and the broker's processes raise
    settings       every setting in one table
    configuration  what a process is told when it starts
    party          a `Server` class, checked and described
    link, wire     the numbered, acknowledged stream between a gateway and a host
    room, turn     what room code sees, and one event handled by one room
    requests       HTTP on the room's side
    host           the process that runs room code; owns no socket, ever
    watchdog       names the handler that blocks the loop
    supervisor     starts the gateway and the hosts, and starts them again

Imports `storage`, never `broker`.
"""
