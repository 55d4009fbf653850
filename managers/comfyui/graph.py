"""A workflow in ComfyUI's API format as nodes and links, and what is wrong with its shape whatever the server.

Knows nothing of node classes: that is `validation.py`. Must never recurse over a graph (a chain of 10,000 nodes is
allowed) and never trust a part of it: everything here came from a client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct

from managers.events.types import Finding

MAX_NODES = 10_000
MAX_DEPTH = 64
MAX_TEXT = 2**23
"""Characters of one text in a graph. Pictures travel as base64 in there, so it has to be long."""
MAX_NAME = 1000
"""Characters of what ends up in messages, events and logs: ids, classes, names of inputs. (Titles are cut.)"""
MAX_STEPS = 1_000_000
"""More than any sampler makes: a number beyond that is none of steps."""

# A workflow with one of these is no workflow at all: the request is malformed (CONTRACT §4: 400, nothing stored).
REFUSED = frozenset(
    {
        "workflow_not_an_object",
        "workflow_format_ui",
        "workflow_wrapped",
        "workflow_too_large",
        "workflow_too_deep",
        "text_too_long",
    }
)

_NESTS = frozenset({dict, list})
_EXPORT_HINT = (
    "This is the format of ComfyUI's editor. Export the API format instead: menu Workflow → Export (API); in older "
    "versions switch on 'Enable Dev mode options' in the settings, then 'Save (API Format)'."
)


class Link(Struct, frozen=True):
    """An input taken from output `slot` of node `source`, as ComfyUI recognises it: `[node id, slot]`."""

    input: str
    source: str
    slot: int | float


class Node(Struct, frozen=True, eq=False):
    """One node. Its input values are unwrapped: ComfyUI takes `{"__value__": x}` for x, once.

    `links` holds those that are links, by input. `title` is what its author called it (`_meta.title`).
    """

    id: str
    class_type: str
    inputs: Mapping[str, Any]
    links: Mapping[str, Link]
    title: str | None = None


Graph = Mapping[str, Node]


def parse_graph(workflow: object) -> dict[str, Node]:
    """The nodes of a workflow, in its order. What is no node is left out: `check_structure` tells about that."""
    nodes: dict[str, Node] = {}
    for node_id, raw in workflow.items() if isinstance(workflow, dict) else ():
        if not isinstance(raw, dict):
            continue
        class_type, inputs = raw.get("class_type"), raw.get("inputs")
        if not isinstance(class_type, str) or not isinstance(inputs, dict):
            continue
        values: dict[str, Any] = {}
        links: dict[str, Link] = {}
        for name, given in inputs.items():
            value = given["__value__"] if isinstance(given, dict) and "__value__" in given else given
            values[name] = value
            # What the executor follows: two elements, a text and a number.
            if isinstance(value, list) and len(value) == 2:
                source, slot = value
                if isinstance(source, str) and isinstance(slot, int | float):
                    links[name] = Link(name, source, slot)
        meta = raw.get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        title = title.strip()[:MAX_NAME] or None if isinstance(title, str) else None
        nodes[node_id] = Node(node_id, class_type, values, links, title)
    return nodes


def check_structure(value: object, *, max_nodes: int = MAX_NODES, max_depth: int = MAX_DEPTH) -> list[Finding]:
    """Everything that keeps `value` from being a graph; empty when each node is one.

    `max_depth` counts nested objects and lists, the workflow itself being the first. A node without `inputs` that
    nothing uses would pass ComfyUI's own check and kill its worker (PROTOCOL §2), so every node is looked at.
    """
    if not isinstance(value, dict):
        return [_refusal("workflow_not_an_object", "The workflow must be an object of nodes by node id.")]
    if isinstance(value.get("nodes"), list):
        return [_refusal("workflow_format_ui", _EXPORT_HINT)]
    if not value:
        return [_refusal("workflow_empty", "The workflow has no nodes.")]
    inner = value.get("prompt")
    if isinstance(inner, dict) and not {"class_type", "inputs"} & inner.keys():
        return [
            _refusal("workflow_wrapped", "This is a whole /prompt request: send only the content of its 'prompt'.")
        ]
    if len(value) > max_nodes:
        message = f"The workflow has {len(value)} nodes; {max_nodes} are allowed."
        return [_refusal("workflow_too_large", message, allowed={"max": max_nodes})]
    if _deeper_than(value, max_depth):
        message = f"The workflow is nested more than {max_depth} levels deep."
        return [_refusal("workflow_too_deep", message, allowed={"max": max_depth})]
    if (length := max(map(len, value))) > MAX_NAME:
        return [_too_long("The id of a node", length, MAX_NAME)]
    found = [finding for node_id, node in value.items() for finding in _check_node(node_id, node)]
    return [finding for finding in found if finding.code in REFUSED] or found


def _check_node(node_id: str, node: object) -> Iterator[Finding]:
    if not isinstance(node, dict):
        message = f"Node {node_id} must be an object with class_type and inputs."
        yield Finding(code="node_not_an_object", message=message, pointer=pointer(node_id), node_id=node_id)
        return
    class_type = node.get("class_type")
    known = class_type if isinstance(class_type, str) and class_type else None
    if known is None:
        yield Finding(
            code="class_type_missing",
            message=f"Node {node_id} has no class_type (a text).",
            pointer=pointer(node_id, "class_type"),
            node_id=node_id,
        )
    elif len(known) > MAX_NAME:
        yield _too_long(f"Node {node_id}: its class_type", len(known), MAX_NAME, node_id, "class_type")
    inputs = node.get("inputs")
    if isinstance(inputs, dict):
        if inputs and (length := max(map(len, inputs))) > MAX_NAME:
            yield _too_long(f"Node {node_id}: the name of an input", length, MAX_NAME, node_id, "inputs")
    else:
        yield Finding(
            code="inputs_missing",
            message=f"Node {node_id} has no inputs (an object, which may be empty).",
            pointer=pointer(node_id, "inputs"),
            node_id=node_id,
            class_type=known,
        )


def find_long_text(value: object, *, max_text: int = MAX_TEXT) -> Finding | None:
    """The first text of more than `max_text` characters. It looks at all of them: ask only where there may be one."""
    for node_id, node in value.items() if isinstance(value, dict) else ():
        waiting = [node]
        while waiting:
            inner = waiting.pop()
            if isinstance(inner, str) and len(inner) > max_text:
                return _too_long(f"Node {shown(node_id)}: a text", len(inner), max_text, node_id[:MAX_NAME])
            if isinstance(inner, dict):
                waiting += [*inner, *inner.values()]
            elif isinstance(inner, list):
                waiting += inner
    return None


def _too_long(what: str, length: int, limit: int, *steps: str) -> Finding:
    message = f"{what} has {length} characters; {limit} are allowed."
    return Finding(code="text_too_long", message=message, pointer=pointer(*steps), allowed={"max": limit})


def _refusal(code: str, message: str, allowed: object = None) -> Finding:
    return Finding(code=code, message=message, pointer=pointer(), allowed=allowed)


def _deeper_than(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        deeper: list[object] = []
        for outer in level:
            inside: Iterable[object] = outer.values() if type(outer) is dict else outer  # type: ignore[assignment]
            deeper += [inner for inner in inside if type(inner) in _NESTS]
        if not deeper:
            return False
        level = deeper
    return True


def ancestors(graph: Graph, starts: Iterable[str]) -> set[str]:
    """The nodes that must run for `starts`, these included."""
    found = {node_id for node_id in starts if node_id in graph}
    waiting = list(found)
    while waiting:
        for link in graph[waiting.pop()].links.values():
            if link.source in graph and link.source not in found:
                found.add(link.source)
                waiting.append(link.source)
    return found


def steps_of(graph: Graph, node: Node) -> int | None:
    """How many steps a node is to make: its input `steps`, or that of the scheduler that gives its `sigmas`."""
    sigmas = node.links.get("sigmas")
    scheduler = None if sigmas is None else graph.get(sigmas.source)
    steps = (scheduler or node).inputs.get("steps")
    return steps if type(steps) is int and 0 < steps <= MAX_STEPS else None


def find_cycles(graph: Graph, limit: int = 10) -> list[tuple[str, ...]]:
    """Up to `limit` circles, each as the ids along it in the direction of the data; the first is not repeated."""
    cycles: list[tuple[str, ...]] = []
    done: set[str] = set()
    for start in graph:
        if start in done:
            continue
        path: dict[str, Iterator[Link]] = {start: iter(graph[start].links.values())}
        while path:
            node_id, links = next(reversed(path.items()))
            link = next(links, None)
            if link is None:
                del path[node_id]
                done.add(node_id)
            elif link.source in path:
                walked = list(path)
                # Links point against the data.
                cycles.append(tuple(reversed(walked[walked.index(link.source) :])))
                if len(cycles) >= limit:
                    return cycles
            elif link.source in graph and link.source not in done:
                path[link.source] = iter(graph[link.source].links.values())
    return cycles


def pointer(*steps: str) -> str:
    """The JSON pointer of a place in the workflow, from the root of the request body (RFC 6901)."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in ("workflow", *steps))


def shown(value: object) -> str:
    """A value as a message names it: short, on one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    except ValueError:  # an integer of more digits than Python will print
        return "a very long number"
    return text if len(text) <= 60 else text[:59] + "…"
