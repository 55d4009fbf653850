"""The prompt queue and the history, all in memory, with the faults of the real one (PROTOCOL 1, 2).

The heap compares whole tuples: two entries with equal number and equal prompt_id make it compare their graphs,
which raises TypeError and leaves the entry in the queue. That is how the real one behaves and is kept on purpose.
"""

import asyncio
import heapq
from collections.abc import Callable, Iterator
from typing import Any, Final

from management_api.simulator.ledger import Ledger

Graph = dict[str, Any]
"""A prompt as it came in: JSON of anybody's making, so nothing about it is promised."""
Item = tuple[float, str, Graph, dict[str, Any], list[str]]
"""number, prompt_id, graph, extra_data, output nodes to execute."""

HISTORY_LIMIT: Final = 10_000


class PromptQueue:
    """Pending heap, running prompts, history. `changed` is called at each put, start, end, delete and clear."""

    def __init__(self, changed: Callable[[], None], ledger: Ledger) -> None:
        self._changed = changed
        self._ledger = ledger
        self._heap: list[Item] = []
        self._running: dict[int, Item] = {}
        self._history: dict[str, dict[str, Any]] = {}
        self._wake = asyncio.Event()
        self._task_id = 0
        self.number = 0
        """The next automatic prompt number."""
        self.unload_models = False
        self.free_memory = False

    def put(self, item: Item) -> None:
        """Queue a prompt. TypeError when an equal (number, prompt_id) waits; the entry stays queued all the same."""
        self._ledger.note("taken", item[1], item[3])
        heapq.heappush(self._heap, item)
        self._changed()
        self._wake.set()

    async def get(self) -> tuple[int, Item] | None:
        """Wait for the next prompt and mark it running; None: only a `free` was asked for. TypeError: see above."""
        while not self._heap and not self.free_memory and not self.unload_models:
            self._wake.clear()
            await self._wake.wait()
        if not self._heap:
            return None
        item = heapq.heappop(self._heap)
        self._ledger.note("begun", item[1], item[3])
        self._task_id += 1
        self._running[self._task_id] = item
        self._changed()
        return self._task_id, item

    def done(self, task_id: int, entry: dict[str, Any]) -> None:
        """Move a running prompt into the history; the oldest entry goes when there are too many."""
        item = self._running.pop(task_id)
        if len(self._history) > HISTORY_LIMIT:
            del self._history[next(iter(self._history))]
        self._history[item[1]] = {"prompt": list(item), **entry}
        self._changed()

    def free(self, *, unload_models: bool, free_memory: bool) -> None:
        """Ask the worker to forget models or cached outputs when it is between two prompts."""
        self.unload_models |= unload_models
        self.free_memory |= free_memory
        self._wake.set()

    def take_flags(self) -> bool:
        """Whether memory is to be freed now; the flags are down afterwards."""
        free_memory, self.free_memory, self.unload_models = self.free_memory, False, False
        return free_memory

    def remaining(self) -> int:
        """Pending and running together."""
        return len(self._heap) + len(self._running)

    def running(self) -> list[Item]:
        """The prompts being executed (one, or none)."""
        return list(self._running.values())

    def pending(self) -> list[Item]:
        """The raw heap array: not sorted, as `/queue` shows it."""
        return list(self._heap)

    def clear(self) -> None:
        """Drop all that wait."""
        for item in self._heap:
            self._ledger.note("deleted", item[1], item[3])
        self._heap.clear()
        self._changed()

    def delete(self, prompt_id: object) -> None:
        """Drop the first waiting prompt of this id; others are silently ignored."""
        for index, item in enumerate(self._heap):
            if item[1] == prompt_id:
                self._ledger.note("deleted", item[1], item[3])
                del self._heap[index]
                heapq.heapify(self._heap)
                self._changed()
                return

    def history(self, max_items: int | None, offset: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Entries oldest first; with only `max_items` the last ones."""
        entries = list(self._history.items())
        if max_items is not None and offset < 0:
            offset = max(0, len(entries) - max_items)
        offset = max(0, offset)
        yield from entries[offset : None if max_items is None else offset + max_items]

    def history_of(self, prompt_id: str) -> dict[str, Any] | None:
        """The entry of one prompt, or None."""
        return self._history.get(prompt_id)

    def forget(self, prompt_id: object) -> None:
        """Drop one history entry; unknown ids are ignored."""
        if isinstance(prompt_id, str):
            self._history.pop(prompt_id, None)

    def forget_all(self) -> None:
        """Drop the whole history."""
        self._history.clear()
