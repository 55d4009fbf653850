"""Runs one prompt: order of nodes, cache of the previous prompt, and the events on the way (PROTOCOL 3).

A node's error or interrupt ends the prompt and is told; anything else that goes wrong here is allowed to escape and
to kill the worker, because that is what happens in the real server (PROTOCOL 1.9).
"""

import asyncio
import time
import traceback
from typing import Any, Final

import msgspec

from management_api.simulator.folders import Folders
from management_api.simulator.graph import DependencyCycle, Plan, link, signatures
from management_api.simulator.ledger import Ledger
from management_api.simulator.node import (
    REGISTRY,
    Blocked,
    Context,
    Inputs,
    Interrupt,
    Interrupted,
    NodeFailure,
    Result,
)
from management_api.simulator.object_info import hidden_inputs, is_output
from management_api.simulator.options import SimulatorOptions
from management_api.simulator.queue import Graph, Item
from management_api.simulator.sockets import Hub, Picture

_OOM_ADVICE: Final = (
    "This error means you ran out of memory on your GPU.\n\nTIPS: If the workflow worked before you might have"
    " accidentally set the batch_size to a large number."
)


class _Kept(msgspec.Struct, frozen=True):
    """What the cache holds of a node that ran."""

    outputs: tuple[Any, ...]
    ui: dict[str, list[Any]] | None
    node_id: str
    display_id: str
    parent_id: str | None
    real_id: str


class _Failed(Exception):
    """Ends the prompt; what there is to say has been sent."""


class Executor:
    """Executes prompts one after the other and remembers the outputs of the last one."""

    def __init__(
        self, hub: Hub, folders: Folders, options: SimulatorOptions, interrupt: Interrupt, ledger: Ledger
    ) -> None:
        self.ledger = ledger
        self.hub = hub
        self.folders = folders
        self.options = options
        self.interrupt = interrupt
        self.cache: dict[str, _Kept] = {}

    async def execute(self, item: Item) -> dict[str, Any]:
        """Run a queued prompt and give its history entry (without the prompt itself)."""
        _, prompt_id, graph, extra_data, targets = item
        self.interrupt.up = False
        self.hub.current_client = extra_data.get("client_id")
        run = _Run(self, prompt_id, graph, extra_data)
        try:
            entry = await run.all(targets)
        finally:
            self.hub.current_node = None
        return entry


class _Run:
    """One prompt under way."""

    def __init__(self, executor: Executor, prompt_id: str, graph: Graph, extra_data: dict[str, Any]) -> None:
        self.executor = executor
        self.hub = executor.hub
        self.client_id: str | None = extra_data.get("client_id")
        self.prompt_id = prompt_id
        self.graph = graph
        self.extra_data = extra_data
        self.nodes: dict[str, dict[str, Any]] = dict(graph)
        self.parent: dict[str, str] = {}
        self.signature: dict[str, str] = {}
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.states: dict[str, dict[str, Any]] = {}
        self.executed: list[str] = []
        self.expansions: dict[str, Result] = {}
        self.tasks: dict[str, asyncio.Task[Result]] = {}
        self.finished = asyncio.Event()
        self.plan = Plan(self.nodes.__getitem__, self._is_cached, self._is_eager)

    async def all(self, targets: list[str]) -> dict[str, Any]:
        self._message("execution_start", {"prompt_id": self.prompt_id})
        self.signature = signatures(self.graph, self._changed)
        kept, wanted = self.executor.cache, set(self.signature.values())
        self.executor.cache = {key: value for key, value in kept.items() if key in wanted}
        cached = [node_id for node_id in self.graph if self._is_cached(node_id)]
        self._message("execution_cached", {"nodes": cached, "prompt_id": self.prompt_id})
        try:
            for target in targets:
                self.plan.add(target)
            await self._loop()
        except _Failed:
            success = False
        else:
            success = True
            self._message("execution_success", {"prompt_id": self.prompt_id})
        finally:
            for task in self.tasks.values():
                task.cancel()
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        await asyncio.sleep(0.001)  # the history entry follows the event by a moment, as recorded (`ws_history_race`)
        return self._entry(success)

    async def _loop(self) -> None:
        while self.plan:
            node_id = self.plan.next()
            if node_id is None:
                if not self.tasks:
                    raise DependencyCycle
                self.finished.clear()
                await self.finished.wait()
                continue
            await self._step(node_id)

    async def _step(self, node_id: str) -> None:
        kept = self.executor.cache.get(self.signature[node_id])
        if kept is not None:
            if kept.ui is not None and self.client_id is not None:
                self._executed(node_id, kept.ui)
            self._finish(node_id)
            self.plan.done(node_id)
            return
        if node_id in self.expansions:
            result = self.expansions[node_id]
            self._keep(node_id, Result(tuple(self._value(value) for value in result.outputs), result.ui))
            return
        if (task := self.tasks.pop(node_id, None)) is not None:
            await self._outcome(node_id, task, {})
            return
        await self._start(node_id)

    async def _start(self, node_id: str) -> None:
        node = self.nodes[node_id]
        inputs = {name: self._value(value) for name, value in node["inputs"].items()}
        self._state(node_id, 0.0, 1.0, "running")
        self.hub.current_node = self._display(node_id)
        if self.client_id is not None:
            data = {"node": node_id, "display_node": self._display(node_id), "prompt_id": self.prompt_id}
            self.hub.send("executing", data, self.client_id)
        blocked = next((value for value in inputs.values() if isinstance(value, Blocked)), None)
        if blocked is not None:
            self._blocked(node_id, blocked)
            return
        kind = REGISTRY[node["class_type"]]
        work = asyncio.ensure_future(self._run(node_id, inputs))
        if not kind.concurrent:
            await asyncio.wait({work})
            await self._outcome(node_id, work, inputs)
            return
        self.tasks[node_id] = work
        self.plan.hold(node_id)
        work.add_done_callback(lambda _: self._release(node_id))

    async def _run(self, node_id: str, inputs: Inputs) -> Result:
        self.executor.interrupt.check()
        context = Context(
            node_id=node_id,
            folders=self.executor.folders,
            options=self.executor.options,
            interrupt=self.executor.interrupt,
            reporter=self,
            prompt=self.graph,
            extra_pnginfo=self.extra_data.get("extra_pnginfo"),
        )
        return await REGISTRY[self.nodes[node_id]["class_type"]].run(context, inputs)

    def _release(self, node_id: str) -> None:
        if node_id in self.tasks:
            self.plan.release(node_id)
        self.finished.set()

    async def _outcome(self, node_id: str, work: "asyncio.Task[Result]", inputs: Inputs) -> None:
        try:
            result = await work
        except Interrupted as stop:
            self._interrupted(node_id)
            raise _Failed from stop
        except Exception as error:
            self._error(node_id, error, inputs)
            raise _Failed from error
        if result.expand:
            self._expand(node_id, result)
        else:
            self._keep(node_id, result)

    def _expand(self, node_id: str, result: Result) -> None:
        for child in result.expand or {}:
            self.nodes[child] = (result.expand or {})[child]
            self.parent[child] = node_id
            self.signature[child] = f"{self.signature[node_id]}/{child}"
        self.expansions[node_id] = result
        for output in result.outputs:
            if (source := link(output)) is not None:
                self.plan.wait_for(node_id, source[0])

    def _keep(self, node_id: str, result: Result) -> None:
        self.executed.append(node_id)
        if result.ui is not None and self.client_id is not None:
            self._executed(node_id, result.ui)
        parent = self.parent.get(node_id)
        kept = _Kept(result.outputs, result.ui, node_id, self._display(node_id), parent, parent or node_id)
        self.executor.cache[self.signature[node_id]] = kept
        self._finish(node_id)
        self.plan.done(node_id)

    def _value(self, value: object) -> object:
        source = link(value)
        if source is None:
            return value
        return self.executor.cache[self.signature[source[0]]].outputs[source[1]]

    def _is_cached(self, node_id: str) -> bool:
        return self.signature[node_id] in self.executor.cache

    def _is_eager(self, node_id: str) -> bool:
        name = self.nodes[node_id]["class_type"]
        return is_output(name) or REGISTRY[name].concurrent

    def _changed(self, node_id: str) -> str:
        node = self.graph[node_id]
        kind = REGISTRY[node["class_type"]]
        own = node_id if "UNIQUE_ID" in hidden_inputs(node["class_type"]).values() else ""
        return own if kind.fingerprint is None else own + kind.fingerprint(self.executor.folders, node["inputs"])

    # What is told ------------------------------------------------------------------------------------------------

    def progress(self, node_id: str, value: float, maximum: float, picture: Picture | None) -> None:
        """Told by a node (see `node.Reporter`)."""
        self._state(node_id, value, maximum, "running")
        client = self.client_id
        metadata = self.hub.takes_metadata(client)
        if picture is not None and metadata and client is not None:
            self.hub.send_preview_with_metadata(picture, self._identity(node_id), client)
        data = {"value": value, "max": maximum, "prompt_id": self.prompt_id, "node": node_id}
        self.hub.send("progress", data, client)
        if picture is not None and not metadata:
            self.hub.send_preview(picture, client)

    def text(self, node_id: str, text: str) -> None:
        """Told by a node (see `node.Reporter`)."""
        self.hub.send_text(node_id, text, self.client_id)

    def _state(self, node_id: str, value: float, maximum: float, state: str) -> None:
        entry = {"value": value, "max": maximum, "state": state} | self._identity(node_id)
        self.states[node_id] = entry
        self.hub.send("progress_state", {"prompt_id": self.prompt_id, "nodes": self.states}, self.client_id)

    def _finish(self, node_id: str) -> None:
        maximum = self.states[node_id]["max"] if node_id in self.states else 1.0
        self._state(node_id, maximum, maximum, "finished")

    def _identity(self, node_id: str) -> dict[str, Any]:
        parent = self.parent.get(node_id)
        return {
            "node_id": node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": self._display(node_id),
            "parent_node_id": parent,
            "real_node_id": self._real(node_id),
        }

    def _real(self, node_id: str) -> str:
        while node_id in self.parent:
            node_id = self.parent[node_id]
        return node_id

    _display = _real

    def _executed(self, node_id: str, ui: dict[str, list[Any]]) -> None:
        data = {"node": node_id, "display_node": self._display(node_id), "output": ui, "prompt_id": self.prompt_id}
        self.hub.send("executed", data, self.client_id)

    def _message(self, kind: str, data: dict[str, Any], *, broadcast: bool = False) -> None:
        data = data | {"timestamp": time.time_ns() // 1_000_000}
        self.executor.ledger.message(kind, self.prompt_id, self.extra_data)
        self.messages.append((kind, data))
        if self.client_id is not None or broadcast:
            self.hub.send(kind, data, self.client_id)

    def _failure(self, node_id: str) -> dict[str, Any]:
        real = self._real(node_id)
        return {
            "prompt_id": self.prompt_id,
            "node_id": real,
            "node_type": self.nodes[real]["class_type"],
            "executed": list(self.executed),
        }

    def _interrupted(self, node_id: str) -> None:
        self._message("execution_interrupted", self._failure(node_id), broadcast=True)

    def _error(self, node_id: str, error: Exception, inputs: Inputs) -> None:
        name = error.type_name if isinstance(error, NodeFailure) else _full_name(type(error))
        advice = _OOM_ADVICE if name == "torch.OutOfMemoryError" else ""
        node = self.nodes[node_id]
        hidden = {key: self._hidden(node_id, what) for key, what in hidden_inputs(node["class_type"]).items()}
        data = {
            "exception_message": f"{error}\n{advice}",
            "exception_type": name,
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {key: [_shown(value)] for key, value in (inputs | hidden).items()},
            "current_outputs": list(self.graph),
        }
        self._message("execution_error", self._failure(node_id) | data)

    def _hidden(self, node_id: str, what: str) -> object:
        values = {"UNIQUE_ID": node_id, "PROMPT": self.graph, "EXTRA_PNGINFO": self.extra_data.get("extra_pnginfo")}
        return values.get(what)

    def _blocked(self, node_id: str, blocked: Blocked) -> None:
        if blocked.message is not None and self.client_id is not None:
            data = {
                "exception_message": f"Execution Blocked: {blocked.message}",
                "exception_type": "ExecutionBlocked",
                "traceback": [],
                "current_inputs": [],
                "current_outputs": [],
            }
            self.hub.send("execution_error", self._failure(node_id) | data, self.client_id)
        self._keep(node_id, Result((Blocked(None),) * 8))

    def _entry(self, success: bool) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        meta: dict[str, Any] = {}
        for node_id in self.nodes:
            kept = self.executor.cache.get(self.signature[node_id])
            if kept is not None and kept.ui is not None:
                outputs[kept.node_id] = kept.ui
                meta[kept.node_id] = {
                    "node_id": kept.node_id,
                    "display_node": kept.display_id,
                    "parent_node": kept.parent_id,
                    "real_node_id": kept.real_id,
                }
        status = {
            "status_str": "success" if success else "error",
            "completed": success,
            "messages": [list(message) for message in self.messages],
        }
        return {"outputs": outputs, "status": status, "meta": meta}


def _full_name(kind: type[Exception]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _shown(value: object) -> str:
    if isinstance(value, list) and value and hasattr(value[0], "size"):
        width, height = value[0].size
        return f"images({len(value)}x{height}x{width}x3)"
    return str(value)
