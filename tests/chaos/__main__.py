"""`python -m tests.chaos run|verdict|sweep|powercut …`."""

import sys

from tests.chaos import powercut, run, sweep, verdict

COMMANDS = {"run": run.main, "verdict": verdict.main, "sweep": sweep.main, "powercut": powercut.main}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m tests.chaos {'|'.join(COMMANDS)} [--help]")
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
