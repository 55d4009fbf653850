"""What waits for a slow peer: bounded, in the order of publication, and without what is out of date. Pure.

Must never drop a packet that must arrive; when too many of those wait, its owner empties it and reads the log later.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

from managers.events.packets import Packet


class Outbox:
    """A queue in which the latest packet of a key takes the place of the one before, at the end of the queue.

    At most `max_live` packets that may be dropped wait; the oldest makes room. `on_drop` hears of each that never
    arrives; `must` is how many wait that have to, and `waiting` is empty when none does.
    """

    __slots__ = ("_max_live", "_next", "_on_drop", "must", "waiting")

    def __init__(self, max_live: int, on_drop: Callable[[], None]) -> None:
        self.must = 0
        self._max_live = max_live
        self._on_drop = on_drop
        self._next = 0
        self.waiting: dict[Hashable, Packet] = {}

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Packet]:
        return iter(self.waiting.values())

    def put(self, packet: Packet) -> None:
        """Add at the end."""
        key = packet.key
        if key is None:
            self._next += 1
            key = self._next
        elif self.waiting.pop(key, None) is not None:
            self._on_drop()
        self.waiting[key] = packet
        if packet.must:
            self.must += 1
        elif len(self.waiting) - self.must > self._max_live:
            del self.waiting[next(key for key, waiting in self.waiting.items() if not waiting.must)]
            self._on_drop()

    def pop(self) -> Packet:
        """Take the first. Raises `KeyError` when nothing waits."""
        key = next(iter(self.waiting), None)
        packet = self.waiting.pop(key)
        self.must -= packet.must
        return packet

    def discard(self, is_stale: Callable[[Packet], bool]) -> None:
        """Drop what may be dropped and is out of date."""
        for key, packet in list(self.waiting.items()):
            if not packet.must and is_stale(packet):
                del self.waiting[key]
                self._on_drop()

    def give_up(self) -> int:
        """Drop all but answers to the client. The `seq` of the first stored event that was dropped, 0 for none."""
        first = 0
        for key, packet in list(self.waiting.items()):
            if packet.seq:
                first = first or packet.seq
                self.must -= 1
            elif packet.must:
                continue
            else:
                self._on_drop()
            del self.waiting[key]
        return first
