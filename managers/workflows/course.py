"""One run, node by node: what is done, how long it took, and how long the rest will take. Pure: it only hears.

Must never guess about a node whose class never ran: then nothing is known of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from managers.comfyui.tracker import GraphNode
from managers.events.types import NodeEvent, NodeExecuted, NodeProgressed
from managers.workflows.durations import TRIVIAL, Durations, Estimate, Known

NodeState = Literal["done", "cached", "running", "stopped", "pending"]

_PACE_STEPS = 2
_OTHERWISE = 0.5
"""A pace that would end it in less than this part of the shortest time known is that of a part of the node alone."""


class NodeTime(Struct, frozen=True, array_like=True):
    """A node that ComfyUI has taken up, or found in its cache. `start_time` is epoch ms, None where nobody saw it.

    `stopped`: the run ended in the middle of it. `seconds` of a running one are those so far.
    """

    node_id: str
    state: NodeState
    start_time: int | None = None
    seconds: float | None = None


class _Steps(Struct):
    """The steps seen of a node: the first of them, and the last. `parts`: it has begun to count anew."""

    first: float
    first_at: int
    last: float
    last_at: int
    most: float
    parts: bool = False


class Course:
    """The nodes of one attempt. Feed it every node event, in order; `now` and times are epoch ms by our own clock.

    `late`: it ran before we listened, so the first node to be seen began we don't know when.
    """

    def __init__(
        self, nodes: Mapping[str, GraphNode], backend: str, durations: Durations, *, late: bool = False
    ) -> None:
        self.backend = backend
        self._nodes = nodes
        self._known = {
            node_id: durations.known(node.class_type, node.steps, backend) for node_id, node in nodes.items()
        }
        self._late = late
        self._ended: int | None = None
        self._states: dict[str, NodeState] = {}
        self._since: dict[str, int | None] = {}
        self._seconds: dict[str, float | None] = {}
        self._steps: dict[str, _Steps] = {}
        self._running: set[str] = set()
        self._pending: dict[str, Estimate | None] = {}
        self._rest = Estimate()
        self._unknown = 0
        self._stale = True

    def hear(self, event: NodeEvent) -> None:
        """A node began, made a step, or ended. One that expands into others counts as a whole."""
        node_id = event.node_id
        if self._ended is not None or node_id not in self._nodes or node_id != event.display_node_id:
            return
        if isinstance(event, NodeExecuted):
            self._end(node_id, event.timestamp, cached=event.node_state == "cached")
        else:
            self._begin(node_id, event)
            if isinstance(event, NodeProgressed):
                self._step(node_id, event)

    def end(self, now: int, *, completed: bool) -> None:
        """ComfyUI executes it no more. What it was at is done when it completed: old ones do not say so."""
        if self._ended is None:
            for node_id in tuple(self._running):
                self._end(node_id, now, cached=False)
                if not completed:
                    self._states[node_id] = "stopped"
            self._ended = now

    def left(self, now: int) -> Estimate | None:
        """How long it will still take; None when that cannot be known.

        Nodes count as though they ran one after another, which is all but true: only few are asynchronous.
        """
        if self._ended is not None:
            return Estimate()
        if self._stale:
            self._look_anew()
        if self._unknown:
            return None
        total = Estimate(max(self._rest.seconds, 0.0), max(self._rest.spread, 0.0))
        for node_id in self._running:
            part = self._left_of(node_id, now)
            if part is None:
                return None
            total += part
        return total

    def times(self, now: int) -> list[NodeTime]:
        """What was seen of each node so far."""
        found = []
        for node_id, state in self._states.items():
            since = self._since.get(node_id)
            seconds = self._seconds.get(node_id)
            if state == "running" and since is not None:
                seconds = max(0, now - since) / 1000
            found.append(NodeTime(node_id, state, since, seconds))
        return found

    def learnt(self) -> Iterator[tuple[GraphNode, float | None]]:
        """Each node that was done and how long it took, None where it was found in the cache."""
        for node_id, state in self._states.items():
            seconds = self._seconds.get(node_id)
            if state == "cached" or (state == "done" and seconds is not None):
                yield self._nodes[node_id], seconds

    # ---- what comes in

    def _begin(self, node_id: str, event: NodeEvent) -> None:
        if node_id in self._states:
            return
        # Where it has made steps already, or is the first we hear of an old run, its beginning was missed.
        unseen = self._late or bool(event.node_progress)
        self._late = False
        self._states[node_id] = "running"
        self._since[node_id] = None if unseen else event.timestamp
        self._running.add(node_id)
        self._no_more_pending(node_id)

    def _step(self, node_id: str, event: NodeProgressed) -> None:
        value, most = event.node_progress or 0.0, event.node_max_progress or 0.0
        seen = self._steps.get(node_id)
        if seen is None:
            self._steps[node_id] = _Steps(value, event.timestamp, value, event.timestamp, most)
        elif value < seen.last or most != seen.most:
            self._steps[node_id] = _Steps(value, event.timestamp, value, event.timestamp, most, parts=True)
        elif value > seen.last:
            if seen.first == 0:  # the first step has the loading in it
                seen.first, seen.first_at = value, event.timestamp
            seen.last, seen.last_at = value, event.timestamp

    def _end(self, node_id: str, at: int, *, cached: bool) -> None:
        state = self._states.get(node_id)
        if state in ("done", "cached"):
            return
        self._states[node_id] = "cached" if cached else "done"
        since = self._since.get(node_id)
        if since is not None:
            self._seconds[node_id] = max(0, at - since) / 1000
        self._running.discard(node_id)
        if cached:
            self._stale = True
        else:
            self._no_more_pending(node_id)

    # ---- what is left

    def _look_anew(self) -> None:
        """What must still run: from the ends of the graph back to what is done, runs, or is in the cache."""
        self._stale = False
        inner = {source for node in self._nodes.values() for source in node.sources}
        waiting = [node_id for node_id in self._nodes if node_id not in inner]
        self._pending, self._rest, self._unknown = {}, Estimate(), 0
        while waiting:
            node_id = waiting.pop()
            if node_id not in self._states and node_id not in self._pending:
                known = self._known_of(node_id)
                nothing = None if self._matters(node_id) else Estimate()
                whole = self._pending[node_id] = nothing if known is None else known.whole()
                self._count(whole, 1)
                waiting += self._nodes[node_id].sources

    def _no_more_pending(self, node_id: str) -> None:
        """It has begun, so all that it takes from is done, seen or not."""
        waiting = [node_id]
        while waiting:
            one = waiting.pop()
            if one in self._pending:
                self._count(self._pending.pop(one), -1)
                waiting += self._nodes[one].sources

    def _count(self, whole: Estimate | None, sign: int) -> None:
        if whole is None:
            self._unknown += sign
        else:
            self._rest += whole.times(sign)

    def _left_of(self, node_id: str, now: int) -> Estimate | None:
        """By its own pace, as soon as it has one; else by what is known of its kind."""
        known, since = self._known_of(node_id), self._since.get(node_id)
        elapsed = 0.0 if since is None else max(0, now - since) / 1000
        steps = self._steps.get(node_id)
        if steps is not None and not steps.parts and steps.first + _PACE_STEPS <= steps.last <= steps.most:
            pace = (steps.last_at - steps.first_at) / 1000 / (steps.last - steps.first)
            share = (steps.most - steps.last) / steps.most
            left = max(0.0, pace * (steps.most - steps.last) - max(0, now - steps.last_at) / 1000)
            if known is None:
                return Estimate(left)
            if elapsed + left >= known.shortest() * _OTHERWISE:
                return Estimate(left, known.whole().spread * share * share)
        if known is None:
            return None if self._matters(node_id) else Estimate()
        return known.left(elapsed)

    def _known_of(self, node_id: str) -> Known | None:
        known = self._known[node_id]
        return known if known is not None and known.histogram.counts else None

    def _matters(self, node_id: str) -> bool:
        return self._nodes[node_id].weight > TRIVIAL
