"""What the parameters of a version take, from the template and from what ComfyUI says of the nodes behind them.

Pure. Must never promise a list that is not whole: while a backend that could run the graph is silent its names are
not known, and nothing is refused for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from managers.comfyui.graph import Graph
from managers.comfyui.nearest import Nearest
from managers.comfyui.object_info import COMBO, Catalog, InputSpec
from managers.templates.model import Definition, Input, Kind, Scalar
from managers.templates.parameter import INTEGERS, NUMBERS, NUMERIC, RANDOM, Parameter, judge, same

SEEDS = frozenset({"seed", "noise_seed"})
_PREFIX = "filename_prefix"
_KINDS = {"INT": Kind.INTEGER, "FLOAT": Kind.NUMBER, "STRING": Kind.STRING, "BOOLEAN": Kind.BOOLEAN}
_FITTING = {
    "INT": {Kind.INTEGER, Kind.SEED, Kind.COLOR},
    "FLOAT": {Kind.NUMBER, Kind.INTEGER},
    "STRING": {Kind.STRING, Kind.FILE},
    "BOOLEAN": {Kind.BOOLEAN},
    COMBO: {Kind.STRING, Kind.FILE, Kind.INTEGER, Kind.NUMBER, Kind.BOOLEAN},
}
_Limit = tuple[int | float, str]


def of_definition(definition: Definition, graph: Graph, catalogs: Sequence[Catalog]) -> dict[str, Parameter]:
    """All parameters, by name; an input whose node is not in the graph is left out. `catalogs`: of the backends that
    may run it.
    """
    return {
        name: _parameter(name, given, graph, catalogs)
        for name, given in definition.inputs.items()
        if given.node in graph
    }


def missing(graph: Graph, catalogs: Sequence[Catalog]) -> tuple[str, ...]:
    """Node classes that no backend has; none while one of them does not say."""
    known = [catalog.object_info for catalog in catalogs if catalog.object_info is not None]
    if not known or len(known) < len(catalogs):
        return ()
    used = {node.class_type for node in graph.values()}
    return tuple(sorted(name for name in used if not any(name in info for info in known)))


def fits(kind: Kind, spec: InputSpec) -> bool:
    """Whether ComfyUI can take what a parameter of this kind gives."""
    return kind in _FITTING.get(spec.type, set(Kind))


def said(given: Input, graph: Graph, catalogs: Sequence[Catalog]) -> Iterator[tuple[str, InputSpec]]:
    """What the backends say of all its places, and of which input each says it."""
    for place in given.places:
        if (node := graph.get(place.node)) is None:
            continue
        for catalog in catalogs:
            node_class = (catalog.object_info or {}).get(node.class_type)
            spec = None if node_class is None else node_class.inputs.get(place.input)
            if spec is not None:
                yield f"ComfyUI's {node.class_type}.{place.input}", spec


def kind_of(given: Input, specs: Sequence[InputSpec], value: object) -> Kind:
    """What the template says it is, else ComfyUI, else the value in the graph."""
    if any(place.input == _PREFIX for place in given.places):
        return Kind.FILE  # a name that leaves the folder is no name
    if given.type is not UNSET:
        return given.type
    for spec in specs:
        if spec.file:
            return Kind.FILE
        if spec.type == "INT" and given.input in SEEDS:
            return Kind.SEED
        if spec.type in _KINDS:
            return _KINDS[spec.type]
        if spec.options is not None and all(isinstance(option, str) for option in spec.options.values):
            return Kind.STRING
    match value:
        case bool():
            return Kind.BOOLEAN
        case int():
            return Kind.SEED if given.input in SEEDS else Kind.INTEGER
        case float():
            return Kind.NUMBER
    return Kind.STRING


def _parameter(name: str, given: Input, graph: Graph, catalogs: Sequence[Catalog]) -> Parameter:
    node = graph[given.node]
    value = node.inputs.get(given.input)
    told = list(said(given, graph, catalogs))
    kind = kind_of(given, [spec for _, spec in told], value)
    (low, low_of), (high, high_of) = _limits(given, kind, told)
    options, backends = _choices(given, graph, catalogs)
    numeric = kind in NUMERIC
    found = Parameter(
        name=name,
        kind=kind,
        places=given.places,
        class_type=node.class_type,
        description=given.description,
        minimum=low if numeric else None,
        maximum=high if numeric else None,
        minimum_of=low_of,
        maximum_of=high_of,
        options=options,
        backends=backends,
    )
    if given.required:
        return found
    default = _default(given, kind, value, options)
    if default is UNSET or judge(found, default, Nearest()) is not None:
        return replace(found, unfit=default)
    return replace(found, default=default)


def _default(given: Input, kind: Kind, value: object, options: tuple[Scalar, ...] | None) -> Any:
    if given.default is not UNSET:
        value = given.default
    elif kind is Kind.SEED:
        value = RANDOM
    if kind is Kind.COLOR and isinstance(value, int):
        value = f"#{value:06x}"
    if value == "" and options:
        value = options[0]
    return UNSET if value is None or isinstance(value, dict | list) else value


def _limits(given: Input, kind: Kind, told: Sequence[tuple[str, InputSpec]]) -> tuple[_Limit, _Limit]:
    """The narrowest of all, and whose they are."""
    outer = NUMBERS if kind is Kind.NUMBER else INTEGERS
    lows: list[_Limit] = [(outer[0], "JSON")]
    highs: list[_Limit] = [(outer[1], "JSON")]
    lows += [(spec.min, whose) for whose, spec in told if spec.min is not None]
    highs += [(spec.max, whose) for whose, spec in told if spec.max is not None]
    lows += [] if given.minimum is UNSET else [(given.minimum, "the template")]
    highs += [] if given.maximum is UNSET else [(given.maximum, "the template")]
    return max(lows, key=lambda one: one[0]), min(highs, key=lambda one: one[0])


def _choices(
    given: Input, graph: Graph, catalogs: Sequence[Catalog]
) -> tuple[tuple[Scalar, ...] | None, dict[str, tuple[Scalar, ...]]]:
    """The values to choose from: what some backend lists, as far as the template lets it be chosen."""
    found: tuple[Scalar, ...] | None = None if given.enum is UNSET else given.enum
    backends: dict[str, tuple[Scalar, ...]] = {}
    for place in given.places:
        class_type = graph[place.node].class_type if place.node in graph else ""
        lists: dict[str, tuple[Scalar, ...]] = {}
        for catalog in catalogs:
            node_class = (catalog.object_info or {}).get(class_type)
            spec = None if node_class is None else node_class.inputs.get(place.input)
            if spec is not None and spec.options is not None:
                lists[catalog.name] = tuple(one for one in spec.options.values if isinstance(one, Scalar))
        # A backend that lacks the class is no hope; one that has not answered may have other names.
        if not lists or any(catalog.object_info is None for catalog in catalogs):
            continue
        everything = tuple(dict.fromkeys(option for options in lists.values() for option in options))
        backends = backends or lists
        found = (
            everything if found is None else tuple(one for one in found if any(same(one, it) for it in everything))
        )
    return found, backends
