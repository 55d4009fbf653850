"""A run on the terminal: bars that move where there is a terminal, a line now and then where there is none.

Must never decide anything about the run; it is told what to show.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self, TextIO

from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from management_api.commands.client import Frame, Workflow
from management_api.commands.terminal import clean

_LINE_SECONDS = 1.0


class Moment(Struct, frozen=True):
    """How a run stands, in what is shown of it. `note` is worth a line of its own; `node` is None between nodes."""

    note: str = ""
    percent: int = 0
    message: str = ""
    node: str | None = None
    step: int | None = None
    steps: int | None = None
    done: int = 0
    total: int = 0


def moment(seen: Workflow | Frame) -> Moment | None:
    """What there is to show; None for nothing."""
    if isinstance(seen, Workflow):
        return _moving(seen, _waits(seen.queue_position) if seen.status == "queued" else "")
    match seen.type:
        case "workflow:queued":
            return Moment(note=_waits(seen.queue_position))
        case "workflow:progress":
            return _moving(seen)
        case "workflow:error" if seen.will_retry:
            return Moment(note=f"{clean(seen.error or 'lost')}; it waits for another attempt")
    return None


def _moving(seen: Workflow | Frame, note: str = "") -> Moment:
    return Moment(
        note=note,
        percent=seen.progress,
        message=clean(seen.message or ""),
        node=clean(seen.current_node) if seen.current_node else None,
        step=seen.step,
        steps=seen.steps,
        done=seen.nodes.done,
        total=seen.nodes.total,
    )


def _waits(position: int | None) -> str:
    return f"queued, {position} before it" if position else "queued, next in line"


class Display(Protocol):
    """Shows one run; a context, so that the terminal is left in order."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """End, whatever happened."""
        ...

    def show(self, seen: Workflow | Frame) -> None:
        """Something happened."""
        ...


def display(stream: TextIO, *, quiet: bool = False) -> Display:
    """What suits the stream."""
    if quiet:
        return Quiet()
    return Bars(stream) if stream.isatty() else Lines(stream)


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        pass

    def show(self, seen: Workflow | Frame) -> None:
        """Nothing."""


class Lines(Quiet):
    """For logs and pipes: a line for every node, and one a second within a long one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._note = ""
        self._node: str | None = None
        self._message = ""
        self._at = 0.0

    def show(self, seen: Workflow | Frame) -> None:
        """Write what is new."""
        now = moment(seen)
        if now is None:
            return
        if now.note and now.note != self._note:
            self._note = now.note
            self._write(now.note)
        last = now.steps is not None and now.step == now.steps
        due = now.node != self._node or last or time.monotonic() - self._at >= _LINE_SECONDS
        if now.message and now.message != self._message and due:
            self._node, self._message, self._at = now.node, now.message, time.monotonic()
            self._write(f"{now.percent:3}%  {now.message}")

    def _write(self, text: str) -> None:
        self._stream.write(f"  {text}\n")
        self._stream.flush()


class Bars(Quiet):
    """For a terminal: a bar for the node, one for the whole, and above them the nodes that are done."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, markup=False, highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._note = ""
        self._node: str | None = None
        self._current: TaskID | None = None
        self._whole: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if error is None and self._node is not None:
            self._console.print(f"  ✓ {self._node}")
        self._progress.stop()

    def show(self, seen: Workflow | Frame) -> None:
        """Move the bars."""
        now = moment(seen)
        if now is None:
            return
        if now.note and now.note != self._note:
            self._note = now.note
            self._console.print(f"  {now.note}")
        if now.node is not None:
            self._show_node(now)
        if now.message or now.percent:
            if self._whole is None:
                self._whole = self._progress.add_task("whole workflow", total=100, shown="")
            shown = f"{now.percent}%" + (f"  {now.done}/{now.total} nodes" if now.total else "")
            self._progress.update(self._whole, completed=now.percent, shown=shown)

    def _show_node(self, now: Moment) -> None:
        if now.node != self._node:
            if self._node is not None:
                self._console.print(f"  ✓ {self._node}")
            if self._current is not None:
                self._progress.remove_task(self._current)
            self._node = now.node
            self._current = self._progress.add_task(now.node or "", total=None, shown="")
        if self._current is not None and now.step is not None and now.steps and now.steps > 1:
            self._progress.update(
                self._current, total=now.steps, completed=now.step, shown=f"{now.step}/{now.steps} steps"
            )
