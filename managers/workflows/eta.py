"""When what waits will be done: the line is dealt out to the backends, in thought. Pure: no clock, no I/O.

Must never look at more of the line than it is given: what is behind that is reckoned from the pace before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from msgspec import Struct

from managers.comfyui.tracker import GraphNode
from managers.workflows.durations import TRIVIAL, Durations, Estimate
from managers.workflows.waiting import Entry


class Shape(Struct, frozen=True, eq=False):
    """All that the time of a waiting workflow depends on: (class, steps, how many of these, whether it matters)."""

    items: tuple[tuple[str, int | None, int, bool], ...]


class Worker(Struct, frozen=True):
    """A backend that is given work from `pools`. `left`: until it is free, None when nobody knows."""

    name: str
    pools: Collection[str]
    left: Estimate | None


class Eta(Struct, frozen=True, gc=False):
    """Seconds until the end: half of the workflows end before `seconds`, nine of ten before `p90`."""

    seconds: float
    p90: float


class _Pool(Struct):
    """The starts of a pool's first and last workflow that were looked at, and how many those are."""

    first: Estimate
    last: Estimate
    count: int
    known: bool = True


class Schedule(Struct, frozen=True):
    """When everything looked at begins and ends. `whole`: there is nothing else in the line."""

    ends: Mapping[str, Estimate | None]
    pools: Mapping[str, _Pool]
    whole: bool

    def start(self, gpu: str, position: int) -> Estimate | None:
        """When one begins that is further back: it goes on at the pace at which the pool's first ones begin."""
        pool = self.pools.get(gpu)
        if pool is None or not pool.known or pool.count < 2:
            return None
        further = (position - pool.count + 1) / (pool.count - 1)
        pace = pool.last + pool.first.times(-1)
        return pool.last + Estimate(max(pace.seconds, 0.0), max(pace.spread, 0.0)).times(max(further, 0.0))


def shape_of(nodes: Mapping[str, GraphNode]) -> Shape:
    """The shape of a graph."""
    counted = Counter((node.class_type, node.steps, node.weight > TRIVIAL) for node in nodes.values())
    return Shape(tuple((name, steps, count, matters) for (name, steps, matters), count in counted.items()))


def expected(shape: Shape, backend: str, durations: Durations) -> Estimate | None:
    """How long such a workflow takes there; None when a class that matters never ran anywhere."""
    total = Estimate()
    for class_type, steps, count, matters in shape.items:
        known = durations.known(class_type, steps, backend)
        if known is not None:
            total += known.expected().times(count)
        elif matters:
            return None
    return total


def schedule(
    line: Iterable[Entry], workers: Iterable[Worker], takes: Callable[[str, str], Estimate | None], *, whole: bool
) -> Schedule:
    """Each workflow of the line goes to the backend that is free first, among those that may have it.

    `takes` tells how long a workflow takes at a backend. One of which nothing is known hides all that comes after it
    on its backend: the others are then told as though that backend did nothing, so they may be done sooner.
    """
    free: dict[str, Estimate] = {}
    able: dict[str, list[str]] = {}
    for worker in workers:
        if worker.left is not None:
            free[worker.name] = worker.left
            for gpu in worker.pools:
                able.setdefault(gpu, []).append(worker.name)
    ends: dict[str, Estimate | None] = {}
    pools: dict[str, _Pool] = {}
    for entry in line:
        names = [name for name in able.get(entry.gpu, ()) if name in free and name not in entry.unfit]
        if not names:
            ends[entry.id] = None
            if entry.gpu in pools:
                pools[entry.gpu].known = False
            continue
        name = min(names, key=lambda name: free[name].seconds)
        start, own = free[name], takes(entry.id, name)
        pool = pools.get(entry.gpu)
        if pool is None:
            pools[entry.gpu] = _Pool(start, start, 1, own is not None)
        else:
            pool.last, pool.count, pool.known = start, pool.count + 1, pool.known and own is not None
        if own is None:
            ends[entry.id] = None
            del free[name]
        else:
            ends[entry.id] = free[name] = start + own
    return Schedule(ends, pools, whole)
