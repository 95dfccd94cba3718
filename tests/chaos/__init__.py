"""Proof that nothing hangs up: the broker is hurt in every way, and a checker reads what became of it.

    history    what happened, in one format: clients, rooms, kills
    checker    what is wrong with a history (pure)
    planting   faults put into a copy of a history, which the checker has to find (pure)
    app        the rooms
    clients    the clients, in one process
    instance   the broker under fire
    killer     kills at random moments
    run        `python -m tests.chaos run`: thousands of clients, kills, the checker's verdict
    verdict    `python -m tests.chaos verdict FOLDER`: the verdict on a history that was kept
    sweep      `python -m tests.chaos sweep`: death at each interesting system call
    powercut   `python -m tests.chaos powercut`: would what was said survive the loss of power?

Each command prints its seed, takes `--help`, and exits with 1 when anything was found, or when the checker
did not find a planted fault of each kind in a copy of that very history. The tests beside run small samples
of all of them. docs/proof.md says what is proved and how to read it. strace is needed for `sweep` and
`powercut`.
"""
