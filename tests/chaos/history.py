"""What ComfyUI's ledgers say, put together: every prompt with its life, its end, and who can have heard of that.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from management_api.simulator.ledger import Line
from tests.chaos.processes import SERVICE, Life

ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
START_SECONDS = 0.2
"""No process listens or connects so soon after its start: what happens then belongs to the one before it."""


class Word(Struct, frozen=True):
    """The end of a prompt has left ComfyUI at `at`; `heard_by` is the service's process that lived there then."""

    at: float
    heard_by: Life | None


class Run(Struct, kw_only=True):
    """One prompt in ComfyUI. Times are epoch seconds; `died` is when its process was killed, if it was."""

    prompt_id: str
    marker: str | None
    client_id: str | None
    backend: str
    pid: int
    taken: float
    died: float | None
    begun: float | None = None
    ended: float | None = None
    verdict: str | None = None
    deleted: float | None = None
    interrupted: float | None = None
    words: list[Word] = []
    exposed: float = 0.0
    """Seconds between its end and the death of its ComfyUI in which one service was connected and could ask."""

    @property
    def cut(self) -> bool:
        """It was executing when its ComfyUI was killed."""
        return self.begun is not None and self.ended is None and self.died is not None


class History(Struct):
    """All prompts, by marker in the order of the ledger; `twice` are prompt ids that were taken more than once."""

    runs: dict[str | None, list[Run]]
    twice: list[str]
    odd: list[str]

    def all(self) -> list[Run]:
        """Every prompt, in the order of the ledger."""
        return sorted((run for runs in self.runs.values() for run in runs), key=lambda run: run.taken)

    def of(self, marker: str) -> list[Run]:
        return self.runs.get(marker, [])


def read(ledgers: Mapping[str, Sequence[Line]], lives: Iterable[Life]) -> History:
    """Put them together."""
    found = History({}, [], [])
    lives = list(lives)
    services = [life for life in lives if life.name == SERVICE]
    by_id: dict[str, Run] = {}
    for backend, lines in ledgers.items():
        ends = {life.pid: life.until for life in lives if life.name == backend}
        sockets: dict[tuple[int, int], float] = {}
        for line in lines:
            if line.event == "socket" and line.socket is not None:
                sockets[line.pid, line.socket] = line.at
            if line.prompt_id is None:
                continue
            run = by_id.get(line.prompt_id)
            if line.event == "taken":
                if run is not None:
                    found.twice.append(line.prompt_id)
                run = by_id[line.prompt_id] = Run(
                    prompt_id=line.prompt_id,
                    marker=line.marker,
                    client_id=line.client_id,
                    backend=backend,
                    pid=line.pid,
                    taken=line.at,
                    died=ends.get(line.pid),
                )
                found.runs.setdefault(line.marker, []).append(run)
            elif run is None:
                found.odd.append(f"{backend}: {line.event} {line.prompt_id} was never taken")
            else:
                _follow(run, line, services, sockets)
        for run in by_id.values():
            if run.backend == backend and run.ended is not None and run.died is not None:
                connected = ((at, _living(services, at, at)) for (pid, _), at in sockets.items() if pid == run.pid)
                stretches = (
                    min(run.died, life.until or run.died) - max(at, run.ended) for at, life in connected if life
                )
                run.exposed = max(0.0, *stretches, 0.0)
    for runs in found.runs.values():
        runs.sort(key=lambda run: run.taken)
    return found


def _follow(run: Run, line: Line, services: list[Life], sockets: Mapping[tuple[int, int], float]) -> None:
    if line.event == "begun":
        run.begun = line.at
    elif line.event == "ended":
        run.ended, run.verdict = line.at, ENDS[line.verdict or ""]
    elif line.event == "deleted":
        run.deleted = line.at
    elif line.event == "interrupted":
        run.interrupted = line.at
    elif line.event == "told":
        since = line.at if line.socket is None else sockets[line.pid, line.socket]
        run.words.append(Word(line.at, _living(services, since, line.at)))


def _living(services: Iterable[Life], since: float, at: float) -> Life | None:
    """The process that has opened a connection at `since`, if it still lived at `at`."""
    owner = max((life for life in services if life.since + START_SECONDS <= since), key=_since, default=None)
    return None if owner is None or (owner.until is not None and owner.until <= at) else owner


def _since(life: Life) -> float:
    return life.since
