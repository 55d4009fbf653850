"""Which node is next, and which nodes are the same as before. Pure: a graph in, names out.

The order follows what the real server was seen to do: output nodes and async nodes as soon as they can run, then
what unblocks them, else the first that is ready.
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import msgspec

from management_api.simulator.queue import Graph


class DependencyCycle(Exception):
    """Nothing can run although nodes are left."""


def link(value: object) -> tuple[str, int] | None:
    """The (node id, slot) that an input value points to, or None for a literal."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int | float)
    ):
        return value[0], int(value[1])
    return None


def links(node: dict[str, Any]) -> list[tuple[str, int]]:
    """All links of a node's inputs, in input order."""
    return [found for value in node["inputs"].values() if (found := link(value)) is not None]


def signatures(graph: Graph, changed: Callable[[str], str]) -> dict[str, str]:
    """A digest for each node of what it computes: class, literals and everything upstream.

    `changed` adds what else makes a node differ (file contents, its own id). KeyError for a node without `inputs`:
    this is how such a node kills the real worker (PROTOCOL, `poison_dead_worker`).
    """
    done: dict[str, str] = {}

    def digest(node_id: str, above: frozenset[str]) -> str:
        if node_id in done:
            return done[node_id]
        if node_id not in graph or node_id in above:
            return f"?{node_id}"
        node = graph[node_id]
        parts: list[object] = [node["class_type"], changed(node_id)]
        for name in sorted(node["inputs"]):
            value = node["inputs"][name]
            target = link(value)
            parts.append([name, digest(target[0], above | {node_id}), target[1]] if target else [name, value])
        done[node_id] = blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()
        return done[node_id]

    for node_id in graph:
        digest(node_id, frozenset())
    return done


class Plan:
    """The nodes still to run and what blocks them. Grows when a node expands into others."""

    def __init__(
        self, node: Callable[[str], dict[str, Any]], cached: Callable[[str], bool], eager: Callable[[str], bool]
    ) -> None:
        self._node = node
        self._cached = cached
        self._eager = eager
        self._pending: dict[str, int] = {}
        self._blocking: dict[str, dict[str, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, node_id: str) -> None:
        """Take in a node and all it needs that is not cached."""
        todo = [node_id]
        while todo:
            current = todo.pop()
            if current in self._pending:
                continue
            self._pending[current] = 0
            self._blocking.setdefault(current, {})
            for source, _ in links(self._node(current)):
                if not self._cached(source):
                    todo.append(source)
                    self._block(source, current)

    def wait_for(self, node_id: str, source: str) -> None:
        """Let a node that already started wait for another one (its expansion)."""
        if not self._cached(source):
            self.add(source)
            self._block(source, node_id)

    def hold(self, node_id: str) -> None:
        """Block a node from outside (its coroutine runs) until `release`."""
        self._pending[node_id] += 1

    def release(self, node_id: str) -> None:
        """Undo `hold`."""
        self._pending[node_id] -= 1

    def done(self, node_id: str) -> None:
        """Drop a finished node and unblock those that waited for it."""
        del self._pending[node_id]
        for target in self._blocking.pop(node_id, {}):
            self._pending[target] -= 1

    def next(self) -> str | None:
        """The node to run now; None when none is ready."""
        ready = [node_id for node_id, blocks in self._pending.items() if blocks == 0]
        for node_id in ready:
            if self._eager(node_id):
                return node_id
        for node_id in ready:
            if any(self._eager(target) for target in self._blocking[node_id]):
                return node_id
        for node_id in ready:
            for target in self._blocking[node_id]:
                if any(self._eager(further) for further in self._blocking.get(target, {})):
                    return node_id
        return ready[0] if ready else None

    def _block(self, source: str, target: str) -> None:
        waiting = self._blocking.setdefault(source, {})
        if target not in waiting:
            waiting[target] = None
            self._pending[target] += 1
