"""What the broker costs, against floors measured in the same run: `make bench`, `python -m tests.benchmarks`.

    __main__   which benchmarks there are, their order, the table and the JSON
    running    starts `broker serve`; reads CPU and memory of its processes from /proc
    load       the client: thousands of raw sockets in one epoll set
    floors     the servers that do the least that could be done, for the ratios
    rooms      the app that is measured
    figures    a figure, its target and its floor
    parked, echo, latency, broadcast, accept, http: one benchmark each

Costs are CPU time wherever that says enough: it hardly depends on what else the machine does. Where wall time
matters (latency, rates) it is printed beside the CPU time, and asserted nowhere.
"""
