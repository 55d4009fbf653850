"""Who waits and in which order, in memory: place and head of the line in O(log n), however long the line is.

Must never do I/O and knows no threads: each `Line` belongs to one thread. The store keeps two of them, one that runs
ahead of the disk and one that follows it, and feeds the second with the `Change`s that the first one recorded.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable
from enum import Enum
from heapq import merge
from itertools import islice

from msgspec import Struct
from sortedcontainers import SortedList

from managers.workflows.model import Priority, QueueCounts

CLASSES = tuple(Priority)


class Entry(Struct, frozen=True, order=True, gc=False):
    """One waiting workflow. The order of the fields is the order of the line: rank, then acceptance.

    `level` is the index of its class in `CLASSES`, `submitter` the name of the key that handed it in,
    `unfit` the backends that must not have it.
    """

    rank: int
    number: int
    id: str
    gpu: str
    level: int
    created_at: int
    submitter: str | None = None
    unfit: tuple[str, ...] = ()


class Act(Enum):
    """What can happen to a line. HOLD: it has an open attempt, so it waits still, but nobody may take it."""

    ENTER = 1
    LEAVE = -1
    HOLD = 2
    FREE = -2
    RUN = 3
    REST = -3
    PAUSE = 4
    RESUME = -4

    @property
    def inverse(self) -> Act:
        """What takes this back."""
        return Act(-self.value)


class Change(Struct, frozen=True, gc=False):
    """One thing that happened; RUN, REST, PAUSE and RESUME are about the line as a whole."""

    act: Act
    entry: Entry | None = None


class Line:
    """All that waits, the number of what runs, and whether work is handed out."""

    def __init__(self) -> None:
        self.running = 0
        self.paused = False
        # By pool, then by class. Within a class the ranks are in the order of submission: the oldest is at its head.
        self._pools: dict[str, tuple[SortedList, ...]] = {}
        self._entries: dict[str, Entry] = {}
        self._held: set[int] = set()
        self._submitters: Counter[str | None] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, workflow_id: str) -> Entry | None:
        """The entry of a workflow, if it waits."""
        return self._entries.get(workflow_id)

    def held(self, entry: Entry) -> bool:
        """Whether it has an open attempt."""
        return entry.number in self._held

    def of_submitter(self, name: str | None) -> int:
        """How many of this key wait."""
        return self._submitters[name]

    def position(self, entry: Entry) -> int:
        """How many of the same pool are before it; the held ones count, they wait too."""
        before = 0
        for line in self._pools[entry.gpu]:
            if line:
                before += line.bisect_left(entry)
        return before

    def ahead(self, gpu: str, rank: int) -> int:
        """How many of the pool would be before one that came now with this rank."""
        newest = Entry(rank=rank, number=sys.maxsize, id="", gpu=gpu, level=0, created_at=0)
        return sum(line.bisect_right(newest) for line in self._pools.get(gpu, ()))

    def next(self, pools: Collection[str], backend: str) -> Entry | None:
        """The first of these pools that nobody holds and this backend may have; None also when paused."""
        if self.paused:
            return None
        held = self._held
        lines = (line for gpu in pools for line in self._pools.get(gpu, ()))
        heads = (
            next((entry for entry in line if entry.number not in held and backend not in entry.unfit), None)
            for line in lines
        )
        return min((head for head in heads if head is not None), default=None)

    def first(self, limit: int) -> list[Entry]:
        """The first ones of all pools together, in order, the held ones too."""
        return list(islice(merge(*(line for classes in self._pools.values() for line in classes if line)), limit))

    def counts(self) -> QueueCounts:
        """The queue at a glance."""
        lines = list(zip(*self._pools.values(), strict=True)) or [()] * len(CLASSES)
        return QueueCounts(
            waiting={priority: sum(map(len, of_class)) for priority, of_class in zip(CLASSES, lines, strict=True)},
            running=self.running,
            oldest_created_at=min(
                (line[0].created_at for of_class in lines for line in of_class if line), default=None
            ),
            paused=self.paused,
        )

    def fill(self, entries: Iterable[Entry]) -> None:
        """Many at once, into an empty line: much quicker than one by one."""
        self._entries = {entry.id: entry for entry in entries}
        self._submitters = Counter(entry.submitter for entry in self._entries.values())
        by_pool: dict[str, tuple[list[Entry], ...]] = {}
        for entry in self._entries.values():
            by_pool.setdefault(entry.gpu, tuple([] for _ in CLASSES))[entry.level].append(entry)
        self._pools = {gpu: tuple(map(SortedList, classes)) for gpu, classes in by_pool.items()}

    def apply(self, change: Change) -> None:
        """Let it happen."""
        act, entry = change.act, change.entry
        if entry is None:
            self._apply_to_all(act)
        elif act is Act.ENTER:
            lines = self._pools.get(entry.gpu)
            if lines is None:
                lines = self._pools[entry.gpu] = tuple(SortedList() for _ in CLASSES)
            lines[entry.level].add(entry)
            self._entries[entry.id] = entry
            self._submitters[entry.submitter] += 1
        elif act is Act.LEAVE:
            self._pools[entry.gpu][entry.level].remove(entry)
            del self._entries[entry.id]
            self._submitters[entry.submitter] -= 1
            if not self._submitters[entry.submitter]:
                del self._submitters[entry.submitter]  # keys come and go
        elif act is Act.HOLD:
            self._held.add(entry.number)
        elif act is Act.FREE:
            self._held.remove(entry.number)

    def _apply_to_all(self, act: Act) -> None:
        if act is Act.RUN:
            self.running += 1
        elif act is Act.REST:
            self.running -= 1
        elif act is Act.PAUSE:
            self.paused = True
        elif act is Act.RESUME:
            self.paused = False


class Draft:
    """A line that runs ahead of the disk: every change is recorded, to be published or taken back."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.changes: list[Change] = []

    def do(self, act: Act, entry: Entry | None = None) -> None:
        """Let it happen here, and remember it."""
        change = Change(act, entry)
        self.line.apply(change)
        self.changes.append(change)

    def leave(self, entry: Entry) -> None:
        """It waits no more, held or not."""
        if self.line.held(entry):
            self.do(Act.FREE, entry)
        self.do(Act.LEAVE, entry)

    def undo_to(self, mark: int) -> None:
        """Take back all changes after the first `mark` ones."""
        while len(self.changes) > mark:
            change = self.changes.pop()
            self.line.apply(Change(change.act.inverse, change.entry))

    def take(self) -> list[Change]:
        """Hand over what was recorded and begin anew."""
        changes, self.changes = self.changes, []
        return changes
