"""What a benchmark has to say: one row a number, with its goal and the command that measured it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class Number(Struct, frozen=True):
    """One measured figure. `met` None: there is no goal, it is told for comparison."""

    measure: str
    figure: str
    goal: str = ""
    met: bool | None = None
    command: str = ""


def below(measure: str, value: float, goal: float, unit: str, *, digits: int = 1) -> Number:
    """A figure that should be at most `goal`."""
    return Number(measure, f"{value:.{digits}f} {unit}", f"≤ {goal:.{digits}f} {unit}", met=value <= goal)


def above(measure: str, value: float, goal: float, unit: str, *, digits: int = 2) -> Number:
    """A figure that should be at least `goal`."""
    return Number(measure, f"{value:,.{digits}f} {unit}", f"≥ {goal:,.{digits}f} {unit}", met=value >= goal)


def told(measure: str, figure: str) -> Number:
    """A figure without a goal."""
    return Number(measure, figure)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def show(numbers: Sequence[Number]) -> None:
    """Print them as a Markdown table."""
    words = {True: "met", False: "NOT met", None: ""}
    rows = [("measure", "figure", "goal", "", "command")]
    rows += [(n.measure, n.figure, n.goal, words[n.met], f"`{n.command}`" if n.command else "") for n in numbers]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]  # five of them
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
