"""Scenarios: the semantics of rooms, each told once and run twice, in the kit and against the real command.

    driver.py       what a scenario does with clients, and what it sees; the record that both runs must share
    in_kit.py       runs it in `broker.testing`
    in_process.py   runs it against one `broker serve` for all scenarios, with raw sockets
    test_scenarios.py  runs each scenario in both, and compares the records

All other modules are scenarios: some parties, and functions called `scenario_…` that take a `Stage`. They
must not wait for real time or look behind the driver; then what passes in the kit passes in production.
"""

import importlib
import pkgutil
from types import ModuleType

from broker import Server

#: Modules of this package that hold no scenarios.
OTHERS = frozenset({"driver", "in_kit", "in_process", "test_scenarios"})


def modules() -> list[ModuleType]:
    """All modules with scenarios."""
    names = sorted(each.name for each in pkgutil.iter_modules(__path__) if each.name not in OTHERS)
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def parties() -> list[type[Server]]:
    """The parties of all scenarios."""
    return [
        value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Server)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
