"""What a process takes, sampled from outside, and whether it grew. Linux only: it reads /proc."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct


class Sample(Struct, frozen=True, kw_only=True):
    """One look. `rss` in KiB; `clients` are the streams that the service says are open."""

    seconds: float
    rss: int
    fds: int
    threads: int
    sockets: int = 0
    clients: int = 0


class Tolerance(Struct, frozen=True, kw_only=True):
    """How much the last quarter of a run may be above the third: halves of the second half.

    The first half is for warming up: caches, pools, the first of everything. `rss` is a share of the third quarter's,
    but at least `rss_kib`; the rest are counts. The medians are compared, so a peak that goes away is none.
    """

    rss: float = 0.04
    rss_kib: int = 4096
    fds: int = 3
    threads: int = 1


def look(pid: int, seconds: float, clients: int = 0) -> Sample:
    """The process now. FileNotFoundError when it is gone."""
    of = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (of / "status").read_text().splitlines() if ":" in line)
    targets = [_target(fd) for fd in (of / "fd").iterdir()]
    return Sample(
        seconds=seconds,
        rss=int(status["VmRSS"].split()[0]),
        fds=len(targets),
        threads=int(status["Threads"]),
        sockets=sum(target.startswith("socket:") for target in targets),
        clients=clients,
    )


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except FileNotFoundError:
        return ""  # closed since it was listed


def growth(samples: Sequence[Sample], tolerance: Tolerance, *, memory: bool = True) -> list[str]:
    """What grew beyond the tolerance, in words. ValueError for too few samples to say."""
    quarter = len(samples) // 4
    if quarter < 2:
        raise ValueError(f"{len(samples)} samples say nothing")
    before, after = samples[-2 * quarter : -quarter], samples[-quarter:]
    allowed = {"fds": tolerance.fds, "threads": tolerance.threads}
    if memory:
        middle = statistics.median(one.rss for one in before)
        allowed["rss"] = max(tolerance.rss_kib, round(middle * tolerance.rss))
    found = []
    for name, more in allowed.items():
        was, now = (statistics.median(getattr(one, name) for one in part) for part in (before, after))
        if now - was > more:
            found.append(f"{name} grew from {was:g} to {now:g}, by more than {more}")
    return found


def table(samples: Sequence[Sample], rows: int = 20) -> list[str]:
    """At most so many of them, evenly, as lines of text."""
    step = max(1, len(samples) // rows)
    shown = [*samples[:-1:step], samples[-1]]
    head = f"{'seconds':>8} {'RSS MiB':>8} {'fds':>5} {'sockets':>8} {'threads':>8} {'streams':>8}"
    return [head] + [
        f"{one.seconds:8.0f} {one.rss / 1024:8.1f} {one.fds:5} {one.sockets:8} {one.threads:8} {one.clients:8}"
        for one in shown
    ]
