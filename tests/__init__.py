"""The tests. The tree mirrors the code: tests/storage tests storage/, and so on.

Beside it stand:

    e2e         the real command with real clients: browser, Node, Python, nginx
    examples    the examples of docs/examples, by the real command
    benchmarks  `make bench`: costs as ratios against a floor measured in the same run
    chaos       `python -m tests.chaos`: kills, power cuts, and a checker of what became of it
    tracing     strace at a running process
    tools       finds the programs that e2e needs; skips without them, fails in CI

Start nothing that outlives the test, listen on loopback only, wait for conditions and never for time.
"""
