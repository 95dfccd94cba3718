"""One measured figure, what it should be, and what the least possible would be."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass
class Figure:
    """A result. `floor` is the same quantity for a server that does the least that could be done."""

    benchmark: str
    name: str
    value: float
    unit: str
    target: float | None = None
    #: Whether the value should be under or over the target.
    wanted: Literal["under", "over"] = "under"
    floor: float | None = None
    floor_name: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The value as a multiple of its floor."""
        return self.value / self.floor if self.floor else None

    @property
    def meets_target(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.wanted == "under" else self.value >= self.target

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "meets_target": self.meets_target}


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0..1) of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def middle(values: Iterable[float]) -> float:
    """The median: one disturbed round does not count."""
    return median(values)


def print_table(figures: list[Figure], console: Console) -> None:
    table = Table(title="What it costs", title_justify="left")
    columns: tuple[tuple[str, Literal["left", "right"]], ...] = (
        ("benchmark", "left"),
        ("figure", "left"),
        ("value", "right"),
        ("unit", "left"),
        ("target", "right"),
        ("floor", "right"),
        ("ratio", "right"),
        ("notes", "left"),
    )
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    before = ""
    for figure in figures:
        met = figure.meets_target
        style = "" if met is None else "green" if met else "red"
        sign = "≤" if figure.wanted == "under" else "≥"
        table.add_row(
            figure.benchmark if figure.benchmark != before else "",
            figure.name,
            f"[{style}]{_short(figure.value)}[/]" if style else _short(figure.value),
            figure.unit,
            "" if figure.target is None else f"{sign} {_short(figure.target)}",
            "" if figure.floor is None else _short(figure.floor),
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            ", ".join(f"{name} {_noted(value)}" for name, value in figure.notes.items()),
        )
        before = figure.benchmark
    console.print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"


def _noted(value: object) -> str:
    return _short(value) if isinstance(value, int | float) else str(value)
