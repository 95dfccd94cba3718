"""The life of rooms: waking, turns, eviction, and the processes they run in.

What people write and set:
    party, hooks   a `Server` class, checked and described
    settings       every setting in one table
    errors         what users' code and the broker's processes raise

Between the processes:
    link, wire     the numbered, acknowledged stream between a gateway and a host, and its words

The host, which runs room code and owns no socket of a client:
    host           the process: link, shards, start and end
    pool, cells    workers, ready rooms, waking and eviction; the records of all this
    turns          what an event means to a room
    room, connection, room_storage    what room code holds in its hands
    staging, outgoing    what a turn has staged; the forms of what it says
    overlap, background    turns that overlap; work beside the turns
    exchanges, requests, replies, feeds, sse    HTTP on the room's side
    neighbours     rooms that reach rooms
    mounted, static_files    applications and files beside the rooms
    blame, suspects, probation, running    whom to blame for a host's death
    alarms, alarm_book, room_alarms    alarms: waking, order, what room code sees
    crons, cron, wall_clock    ticks, expressions, the time of day
    commits        what is on disk before what leaves
    suspension     turns that wait, without a task for each
    watchdog       names the handler that blocks the loop

The keeper, which holds sockets while gateways come and go:
    keeper, keeper_table    the process; what it holds (pure)
    keeping, keeper_messages    its clients' side; the words between them

All processes:
    supervisor                     start, takeover, stop; orders
    keepers, gateways, hosts       who has which place, and who is next
    handover                       one gateway takes another's place
    children, child, plan          processes, their signs of life; what to run, deadlines
    processes, listener            the list of processes; the listening socket
    control, gateway_line, admin   the supervisor's door, its line to the gateway, the command line's side
    configuration, logs, memory    what a process is told, says and gives back

Imports `storage`, never `broker`.
"""
