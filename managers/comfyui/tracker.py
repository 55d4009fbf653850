"""From ComfyUI's messages about one prompt to progress in plain words. Pure: no clock, no I/O.

Must never decide how a prompt ended: it collects evidence, and `backend` asks ComfyUI for the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from msgspec import Struct

from managers.comfyui import nodes as names
from managers.comfyui.graph import Graph, ancestors, steps_of
from managers.comfyui.object_info import NodeClass
from managers.comfyui.outputs import outputs_of
from managers.comfyui.protocol import (
    Body,
    Executed,
    Executing,
    ExecutionCached,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    NodeState,
    Progress,
    ProgressState,
)
from managers.events.types import (
    Event,
    NodeCounts,
    NodeExecuted,
    NodeExecuting,
    NodeProgressed,
    Output,
    WorkflowProgress,
)

_ALWAYS_TOLD = (ExecutionStart, ExecutionSuccess, ExecutionInterrupted, ExecutionError)


class GraphNode(Struct, frozen=True):
    """What one needs to know of a node. `steps`: how many the graph asks for; `sources`: the nodes it takes from."""

    class_type: str
    name: str
    weight: float
    steps: int | None = None
    sources: tuple[str, ...] = ()


def describe(graph: Graph, node_class: Callable[[str], NodeClass | None]) -> dict[str, GraphNode]:
    """The nodes that will run (those an output depends on), named; all nodes when no output node is known.

    `node_class` gives what /object_info says of a class, None where nobody has told.
    """
    classes = {node_id: node_class(node.class_type) for node_id, node in graph.items()}
    outputs = [node_id for node_id, found in classes.items() if found is not None and found.output_node]
    needed = ancestors(graph, outputs) or set(graph)
    described = {}
    for node_id, node in graph.items():
        if node_id in needed:
            found = classes[node_id]
            name = names.node_name(node.class_type, node.title, found.display_name if found else None)
            sources = tuple(link.source for link in node.links.values() if link.source in needed)
            described[node_id] = GraphNode(
                node.class_type, name, names.weight(node.class_type), steps_of(graph, node), sources
            )
    return described


class Evidence(Struct):
    """What the socket has shown about the end, in case ComfyUI dies before its history can be read."""

    started: int | None = None
    ended: int | None = None
    verdict: Literal["success", "error", "interrupted"] | None = None
    error: ExecutionError | None = None
    blocked: list[ExecutionError] = []
    outputs: dict[str, list[Output]] = {}


class Tracker:
    """Follows one attempt. Feed it every message that names its prompt, in order."""

    def __init__(self, workflow_id: str, graph: Mapping[str, GraphNode]) -> None:
        self.evidence = Evidence()
        self._workflow_id = workflow_id
        self._graph = graph
        self._total_weight = sum(node.weight for node in graph.values()) or 1.0
        self._share: dict[str, float] = {}  # node id -> the part of it that is done, 0..1
        self._cached: set[str] = set()
        self._states: dict[str, NodeState] = {}
        self._told_done: set[str] = set()
        self._current: str | None = None
        self._step: tuple[int, int] | None = None
        self._sees_progress_state = False
        self._percent = 0
        self._told: tuple[object, ...] | None = None

    def feed(self, body: Body, now: int) -> list[Event]:
        """Take in one message; returns what a client should hear. `now` is epoch ms.

        Last comes the overall progress, where it is news, and at the start and the end in any case.
        """
        events: list[Event] = []
        match body:
            case ExecutionStart():
                self.evidence.started = body.timestamp or now
            case ExecutionCached():
                for node_id in body.nodes:
                    if node_id in self._graph:
                        self._cached.add(node_id)
                        self._share[node_id] = 1.0
                        events.append(self._executed(node_id, now, state="cached"))
            case Executing(node=str(node_id)):
                self._begin(node_id, body.display_node, now, events)
            case Progress(node=node_id) if node_id is not None and not self._sees_progress_state:
                state = NodeState(body.value, body.max, "running", node_id, self._display(node_id))
                self._move(node_id, state, now, events)
            case ProgressState():
                self._sees_progress_state = True
                for node_id, state in body.nodes.items():
                    self._move(node_id, state, now, events)
            case Executed():
                shown = self._display(body.display_node or body.node)
                found = list(outputs_of(shown, body.output))
                if found:
                    self.evidence.outputs[shown] = found
                events.append(self._executed(body.node, now, output=body.output, display=shown))
                if shown in self._graph:
                    self._share[shown] = 1.0
            case ExecutionSuccess():
                self.evidence.verdict, self.evidence.ended = "success", body.timestamp or now
            case ExecutionInterrupted():
                self.evidence.verdict, self.evidence.ended = "interrupted", body.timestamp or now
            case ExecutionError():
                # A blocked branch says execution_error and the prompt goes on (PROTOCOL §3).
                if body.exception_type == "ExecutionBlocked":
                    self.evidence.blocked.append(body)
                else:
                    self.evidence.verdict, self.evidence.error = "error", body
                    self.evidence.ended = body.timestamp or now
            case _:
                return []
        told = self._told
        self._told = self._standing()
        if self._told != told or isinstance(body, _ALWAYS_TOLD):
            events.append(self._progress(now))
        return events

    @property
    def percent(self) -> int:
        """The overall progress last told."""
        return self._percent

    def counts(self) -> NodeCounts:
        """Nodes needed, done, cached."""
        done = sum(1 for share in self._share.values() if share >= 1.0)
        return NodeCounts(total=len(self._graph), done=done, cached=len(self._cached))

    # ---- inside

    def _standing(self) -> tuple[object, ...]:
        """All that progress is made of."""
        done = sum(self._graph[node_id].weight * share for node_id, share in self._share.items())
        # 100 is for the verdict alone: what only seems finished may still fail.
        self._percent = max(self._percent, min(99, int(100 * done / self._total_weight)))
        return self._percent, self._current, self._step, self.counts()

    def _progress(self, now: int) -> WorkflowProgress:
        node = self._graph.get(self._current) if self._current else None
        step, steps = self._step or (None, None)
        return WorkflowProgress(
            timestamp=now,
            workflow_id=self._workflow_id,
            progress=self._percent,
            current_node=node.name if node else None,
            current_node_id=self._current,
            current_node_type=node.class_type if node else None,
            step=step,
            steps=steps,
            message=names.message(node.class_type, node.name, step, steps) if node else None,
            nodes=self.counts(),
        )

    def _display(self, node_id: str) -> str:
        """The node of the graph that stands for an expanded one (`2.0.0.1` -> `2`)."""
        if node_id in self._graph:
            return node_id
        known = self._states.get(node_id)
        if known is not None and known.display_node_id in self._graph:
            return known.display_node_id or node_id
        return node_id.split(".", 1)[0] if node_id.split(".", 1)[0] in self._graph else node_id

    def _begin(self, node_id: str, display_node: str | None, now: int, events: list[Event]) -> None:
        shown = self._display(display_node or node_id)
        if not self._sees_progress_state and self._current is not None and self._current != shown:
            # Servers before mid-2025 never say that a node is finished: the next one beginning says it.
            if self._current in self._graph:
                self._share[self._current] = 1.0
            self._tell_done(self._current, now, events)
        if shown != self._current:
            self._current, self._step = shown, None
        if node_id not in self._states:
            self._states[node_id] = NodeState(node_id=node_id, display_node_id=shown)
            events.append(NodeExecuting(**self._node_fields(node_id, now)))

    def _move(self, node_id: str, state: NodeState, now: int, events: list[Event]) -> None:
        before = self._states.get(node_id)
        self._states[node_id] = state
        if before is not None and (before.value, before.max, before.state) == (state.value, state.max, state.state):
            return
        shown = self._display(state.display_node_id or node_id)
        finished = state.state == "finished"
        fraction = 1.0 if finished else min(max(state.value / state.max, 0.0), 1.0) if state.max else 0.0
        if shown == node_id and shown in self._graph:
            self._share[shown] = max(self._share.get(shown, 0.0), fraction if finished else min(fraction, 0.99))
        if before is None and not finished:
            events.append(NodeExecuting(**self._node_fields(node_id, now)))
        if finished:
            self._tell_done(node_id, now, events)
            return
        if state.max > 1:
            self._current = shown
            self._step = (int(state.value), int(state.max))
            events.append(NodeProgressed(**self._node_fields(node_id, now)))
        elif self._current is None:
            self._current = shown

    def _tell_done(self, node_id: str, now: int, events: list[Event]) -> None:
        if node_id not in self._told_done:
            events.append(self._executed(node_id, now))

    def _executed(
        self,
        node_id: str,
        now: int,
        *,
        output: Any = None,
        state: Literal["finished", "cached"] = "finished",
        display: str | None = None,
    ) -> NodeExecuted:
        self._told_done.add(node_id)
        fields = self._node_fields(node_id, now) | {"node_state": state, "node_percentage": 100}
        if display is not None:
            fields["display_node_id"] = display
        return NodeExecuted(**fields, output=output)

    def _node_fields(self, node_id: str, now: int) -> dict[str, Any]:
        state = self._states.get(node_id) or NodeState(node_id=node_id)
        shown = self._display(state.display_node_id or node_id)
        node = self._graph.get(shown)
        counted = state.max > 1
        step, steps = (int(state.value), int(state.max)) if counted else (None, None)
        return {
            "timestamp": now,
            "workflow_id": self._workflow_id,
            "node_id": node_id,
            "display_node_id": shown,
            "parent_node_id": state.parent_node_id,
            "real_node_id": state.real_node_id or node_id,
            "node_type": node.class_type if node else None,
            "node_name": node.name if node else None,
            "node_state": "finished" if state.state == "finished" else "running",
            "node_progress": state.value if counted else None,
            "node_max_progress": state.max if counted else None,
            "node_percentage": round(100 * state.value / state.max) if state.max else None,
            "message": names.message(node.class_type, node.name, step, steps) if node else None,
        }
