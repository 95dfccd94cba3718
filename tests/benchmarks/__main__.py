"""`python -m tests.benchmarks [NAME ...] [--quick] [--json FILE]`: runs them one after the other."""

import argparse
import json
import os
import platform
import resource
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tests.benchmarks import accept, broadcast, echo, http, latency, parked, silence
from tests.benchmarks.figures import Figure, print_table

BENCHMARKS: dict[str, Callable[[bool], list[Figure]]] = {
    module.NAME: module.run for module in (parked, echo, latency, broadcast, accept, http, silence)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        choices=[*BENCHMARKS, []],
        help=f"one or more of {', '.join(BENCHMARKS)}; all without any",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small numbers: does it run, not what does it cost"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    # The limit of open files holds for client and gateway each.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console = Console(width=None if os.isatty(1) else 170)
    figures: list[Figure] = []
    for name in options.names or BENCHMARKS:
        with console.status(f"{name} …"):
            figures += BENCHMARKS[name](options.quick)
    print_table(figures, console)
    if options.json is not None:
        machine = {"python": platform.python_version(), "kernel": platform.release(), "cpus": os.cpu_count()}
        document = {
            "machine": machine,
            "quick": options.quick,
            "figures": [figure.as_json() for figure in figures],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
