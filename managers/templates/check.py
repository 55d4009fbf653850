"""Whether a definition is one that can be saved: its graph is one, and its inputs name what is in it.

Pure. Must never refuse what only this moment lacks: a model or a class that is not installed is told, and may come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UNSET

from managers.comfyui.graph import Graph, Node, check_structure, parse_graph, shown
from managers.comfyui.nearest import Nearest
from managers.comfyui.object_info import Catalog
from managers.events.types import Finding
from managers.templates.model import Definition, Input, Kind, Place
from managers.templates.parameter import INTEGERS, NUMERIC, Parameter, judge
from managers.templates.resolve import fits, of_definition, said


def check(definition: Definition, graph: object, catalogs: Sequence[Catalog]) -> list[Finding]:
    """Everything that is wrong; `graph` is that of the definition, decoded. The pointers are those of its JSON."""
    if broken := check_structure(graph):
        return [_moved(finding) for finding in broken]
    nodes = parse_graph(graph)
    nearest = Nearest()
    found = list(_outputs(definition, nodes, nearest))
    for name, given in definition.inputs.items():
        found += _places(name, given, nodes, catalogs, nearest)
    takes = of_definition(definition, nodes, catalogs)
    for name, given in definition.inputs.items():
        if not found and name in takes:
            found += _limits(name, given, takes[name], nodes, catalogs)
    return found


def _moved(finding: Finding) -> Finding:
    """The same in a body where the graph is called so."""
    place = finding.pointer.removeprefix("/workflow")
    return Finding(
        code=finding.code,
        message=finding.message.replace("The workflow", "The graph"),
        pointer=f"/graph{place}",
        node_id=finding.node_id,
        class_type=finding.class_type,
        allowed=finding.allowed,
    )


def _outputs(definition: Definition, nodes: Graph, nearest: Nearest) -> Iterator[Finding]:
    for n, node_id in enumerate(definition.outputs):
        if node_id not in nodes:
            yield _no_node(f"/outputs/{n}", node_id, nodes, nearest)


def _places(
    name: str, given: Input, nodes: Graph, catalogs: Sequence[Catalog], nearest: Nearest
) -> Iterator[Finding]:
    for n, place in enumerate(given.places):
        where = f"/inputs/{name}" if n == 0 else f"/inputs/{name}/also/{n - 1}"
        node = nodes.get(place.node)
        if node is None:
            yield _no_node(f"{where}/node", place.node, nodes, nearest)
        elif (link := node.links.get(place.input)) is not None:
            message = f"{name}: {place.input} of {_named(node)} is linked to node {link.source}, and takes no value"
            yield _finding("input_is_linked", message, f"{where}/input", node, place)
        else:
            yield from _declared(name, place, node, catalogs, nearest, f"{where}/input")


def _declared(
    name: str, place: Place, node: Node, catalogs: Sequence[Catalog], nearest: Nearest, where: str
) -> Iterator[Finding]:
    """An input that the graph does not set is only one if ComfyUI says so."""
    if place.input in node.inputs:
        return
    classes = [
        info[node.class_type] for catalog in catalogs if (info := catalog.object_info) and node.class_type in info
    ]
    if any(place.input in known.inputs for known in classes):
        return
    literals = [one for one in node.inputs if one not in node.links]
    names = list(dict.fromkeys([*literals, *(one for known in classes for one in known.inputs)]))
    close = nearest.among(place.input, names)
    perhaps = f" (perhaps {', '.join(map(shown, close))})" if close else ""
    message = (
        f"{name}: {_named(node)} has no input {shown(place.input)}{perhaps}; it has {', '.join(names) or 'none'}"
    )
    yield _finding("unknown_input", message, where, node, place, allowed=names, suggestions=close)


def _limits(
    name: str, given: Input, takes: Parameter, nodes: Graph, catalogs: Sequence[Catalog]
) -> Iterator[Finding]:
    node, where, place = nodes[given.node], f"/inputs/{name}", given.places[0]
    for whose, spec in said(given, nodes, catalogs):
        if not fits(takes.kind, spec):
            message = f"{name} is of type {takes.kind}, while {whose} takes {spec.type}"
            yield _finding("type_mismatch", message, f"{where}/type", node, place)
            return
    if takes.minimum is not None and takes.maximum is not None and takes.minimum > takes.maximum:
        low, high = shown(takes.minimum), shown(takes.maximum)
        message = (
            f"{name}: nothing lies between {low}, the least that {takes.minimum_of} takes, and {high}, "
            f"the most that {takes.maximum_of} does"
        )
        yield _finding("empty_range", message, where, node, place)
        return
    if takes.kind in NUMERIC and takes.kind is not Kind.NUMBER:
        for field in ("minimum", "maximum"):
            limit = getattr(given, field)
            if limit is not UNSET and (limit != int(limit) or not INTEGERS[0] <= limit <= INTEGERS[1]):
                message = f"{name}: its {field} {shown(limit)} is no whole number of 64 bits"
                yield _finding("invalid_value", message, f"{where}/{field}", node, place)
    own = Parameter(
        name=name, kind=takes.kind, places=takes.places, class_type=takes.class_type, minimum=takes.minimum,
        maximum=takes.maximum, minimum_of=takes.minimum_of, maximum_of=takes.maximum_of,
        options=None if given.enum is UNSET else given.enum,
    )  # fmt: skip
    for n, option in enumerate(() if given.enum is UNSET else given.enum):
        if (wrong := judge(own, option, Nearest())) is not None:
            yield _finding(wrong.code, wrong.message, f"{where}/enum/{n}", node, place, allowed=wrong.allowed)
    # `""` is the first of a list; what is only not installed may come.
    if given.default not in (UNSET, "") and (wrong := judge(own, given.default, Nearest())) is not None:
        message = f"the default of {wrong.message}"
        yield _finding(wrong.code, message, f"{where}/default", node, place, allowed=wrong.allowed)


def _named(node: Node) -> str:
    return f"{node.class_type} ({node.id})"


def _no_node(where: str, node_id: str, nodes: Graph, nearest: Nearest) -> Finding:
    close = nearest.among(node_id, tuple(nodes))
    known = ", ".join(_named(node) for node in list(nodes.values())[:30])
    return Finding(
        code="unknown_node",
        message=f"There is no node {shown(node_id)} in the graph; it has {known}",
        pointer=where,
        node_id=node_id,
        allowed=list(nodes)[:100],
        suggestions=close,
    )


def _finding(
    code: str,
    message: str,
    where: str,
    node: Node,
    place: Place,
    *,
    allowed: object = None,
    suggestions: tuple[str, ...] = (),
) -> Finding:
    return Finding(
        code=code,
        message=message,
        pointer=where,
        node_id=node.id,
        class_type=node.class_type,
        input=place.input,
        allowed=allowed,
        suggestions=suggestions,
    )
