"""Whether a workflow can run on the backends there are, from what `/object_info` says of their node classes.

Pure: fetching catalogues, and fetching them again before a strict refusal, is the caller's. Follows what ComfyUI's
own check does (PROTOCOL §2; the codes are ComfyUI's where it has one). Must never turn a doubt into an error: model
lists change, custom nodes take inputs they do not declare. An error says that no ComfyUI here could run it; all else
is a warning (CONTRACT §4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import islice
from typing import Any, Literal

from msgspec import Struct

from managers.comfyui.filenames import annotated, unsafe_names
from managers.comfyui.graph import (
    MAX_DEPTH,
    MAX_NODES,
    Graph,
    Link,
    Node,
    ancestors,
    check_structure,
    find_cycles,
    parse_graph,
    pointer,
    shown,
)
from managers.comfyui.inputs import is_source
from managers.comfyui.nearest import Nearest
from managers.comfyui.object_info import ANY, COMBO, Catalog, InputSpec, ObjectInfo, Options
from managers.comfyui.rejection import findings_from_rejection, scrub
from managers.events.types import Finding

__all__ = ["MAX_FINDINGS", "Validation", "concerned_classes", "findings_from_rejection", "scrub", "validate"]

MAX_FINDINGS = 200
_MAX_ALLOWED = 100

# Types that only a link can carry. Any other may be drawn as a widget by some custom node, whose literals pass.
_SOCKETS = frozenset(
    "IMAGE MASK LATENT MODEL CLIP VAE CONDITIONING CLIP_VISION CLIP_VISION_OUTPUT CONTROL_NET STYLE_MODEL"  # noqa: SIM905
    " UPSCALE_MODEL AUDIO VIDEO SIGMAS SAMPLER NOISE GUIDER".split()
)
_CONVERSIONS: dict[str, type[int] | type[float] | type[str] | type[bool]] = {
    "INT": int,
    "FLOAT": float,
    "STRING": str,
    "BOOLEAN": bool,
}


class Validation(Struct, frozen=True):
    """The verdict. `findings`: errors first, then warnings, at most MAX_FINDINGS.

    `eligible`: the backends that may be given the workflow, in the order of the catalogues; empty only when it is
    fatal or there are no catalogues. `clean`: those of them that have answered and where nothing was found.
    `outputs`: the ids of the workflow's output nodes, as far as the backends that answer know.
    """

    findings: tuple[Finding, ...] = ()
    eligible: tuple[str, ...] = ()
    clean: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def fatal(self) -> bool:
        """Whether we fail the workflow ourselves (CONTRACT §4, lenient handling)."""
        return any(finding.severity == "error" for finding in self.findings)


def validate(
    value: object, catalogs: Sequence[Catalog], *, max_nodes: int = MAX_NODES, max_depth: int = MAX_DEPTH
) -> Validation:
    """Check a workflow as it came from the client against the backends that may run it. Raises on no JSON value.

    Where several backends can run it, the findings are those of the one that has the fewest.
    """
    broken = check_structure(value, max_nodes=max_nodes, max_depth=max_depth)
    if broken:
        return Validation(tuple(broken[:MAX_FINDINGS]))
    graph = parse_graph(value)
    known = [(catalog.name, catalog.object_info) for catalog in catalogs if catalog.object_info is not None]
    infos = [info for _, info in known]
    away = len(known) < len(catalogs)
    used = {node.class_type for node in graph.values()}
    lacking = {name: len(used - info.keys()) for name, info in known}
    fewest = min(lacking.values(), default=0)
    best = [(name, info) for name, info in known if lacking[name] == fewest]
    nearest = Nearest()

    outputs, perhaps = _outputs(graph, infos)
    live = ancestors(graph, [*outputs, *perhaps])
    everywhere = _cycles(graph, live)
    everywhere += unsafe_names(graph, infos, live)
    if known and fewest and not away:
        everywhere += _missing_classes(graph, infos, nearest)
    if not outputs and not perhaps:
        message = "No node of the workflow gives an output. Add one that saves or previews, such as SaveImage."
        everywhere.append(Finding(code="prompt_no_outputs", message=message, pointer=pointer()))
    everywhere += _broken_links(graph, live)
    found = {name: list(islice(_check_nodes(graph, info, nearest), MAX_FINDINGS)) for name, info in best}

    findings = everywhere + min(found.values(), key=len, default=[])
    findings.sort(key=lambda finding: finding.severity)  # "error" before "warning", and stable
    verdict = Validation(tuple(findings[:MAX_FINDINGS]), outputs=outputs)
    if verdict.fatal:
        return verdict
    # Where each backend that answers lacks a class, those away are the hope; with none away, ComfyUI judges.
    names = {name for name, _ in best if not (fewest and away)}
    names |= {catalog.name for catalog in catalogs if catalog.object_info is None}
    return Validation(
        verdict.findings,
        eligible=tuple(catalog.name for catalog in catalogs if catalog.name in names),
        clean=tuple(name for name in found if not (everywhere or found[name] or fewest)),
        outputs=outputs,
    )


def concerned_classes(findings: Iterable[Finding], *, only_missing: bool = False) -> frozenset[str]:
    """The classes to ask about again before the findings are believed; `only_missing`: those not found at all."""
    return frozenset(
        finding.class_type
        for finding in findings
        if finding.class_type is not None and (finding.code == "missing_node_type" or not only_missing)
    )


def _outputs(graph: Graph, infos: Sequence[ObjectInfo]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The output nodes, and those that may be some: nobody who answers knows their class."""
    outputs, perhaps = [], []
    for node in graph.values():
        classes = [info[node.class_type] for info in infos if node.class_type in info]
        if any(found.output_node for found in classes):
            outputs.append(node.id)
        elif not classes:
            perhaps.append(node.id)
    return tuple(outputs), tuple(perhaps)


def _cycles(graph: Graph, live: Set[str]) -> list[Finding]:
    """A circle among nodes that no output needs is harmless: ComfyUI never walks it."""
    findings = []
    for cycle in find_cycles(graph):
        around = [*cycle, cycle[0]]
        if len(around) > 12:
            around = [*around[:6], "…", *around[-5:]]
        path = " → ".join(f"{graph[step].class_type} ({step})" if step in graph else step for step in around)
        findings.append(
            Finding(
                code="dependency_cycle",
                message=f"The nodes form a circle: {path}.",
                pointer=pointer(cycle[0]),
                severity="error" if cycle[0] in live else "warning",
                node_id=cycle[0],
                class_type=graph[cycle[0]].class_type,
            )
        )
    return findings


def _missing_classes(graph: Graph, infos: Sequence[ObjectInfo], nearest: Nearest) -> list[Finding]:
    """Classes that no backend has: errors, even where unreachable (ComfyUI minds). Each somewhere: warnings."""
    anywhere: set[str] = set().union(*infos)
    absent = {node.class_type for node in graph.values()} - anywhere
    # Display names too: people write `Save Image` for SaveImage.
    aliases = {found.display_name: name for info in infos for name, found in info.items() if found.display_name}
    candidates = [*anywhere, *aliases]
    findings = []
    for node in graph.values():
        if node.class_type in absent:
            close = nearest.among(node.class_type, candidates)
            message, severe = f"No backend has the node class {shown(node.class_type)}", True
        elif not absent and any(node.class_type not in info for info in infos):
            close, severe = (), False
            message = f"No backend has all classes of the workflow, and some lack {shown(node.class_type)}"
        else:
            continue
        suggestions = tuple(dict.fromkeys(aliases.get(name, name) for name in close))
        findings.append(
            Finding(
                code="missing_node_type",
                message=message + _perhaps(suggestions),
                pointer=pointer(node.id, "class_type"),
                severity="error" if severe else "warning",
                node_id=node.id,
                class_type=node.class_type,
                suggestions=suggestions,
            )
        )
    return findings


def _broken_links(graph: Graph, live: Set[str]) -> list[Finding]:
    """Links to nodes that are not there: errors where an output needs them.

    ComfyUI's check refuses such a link only in an input that the class declares. It does not see one in any other
    input, nor one wrapped in `__value__`: the executor meets it outside of any handler, and the worker is dead (seen
    on 0.3.64).
    """
    return [
        _finding(
            node,
            link.input,
            "link_to_missing_node",
            f"comes from node {shown(link.source)}, which is not there",
            severity="error" if node.id in live else "warning",
        )
        for node in graph.values()
        for link in node.links.values()
        if link.source not in graph
    ][:MAX_FINDINGS]


def _check_nodes(graph: Graph, info: ObjectInfo, nearest: Nearest) -> Iterator[Finding]:
    for node in graph.values():
        declared = info.get(node.class_type)
        if declared is None:
            continue
        for name, spec in declared.inputs.items():
            if name in node.links:
                yield from _check_link(graph, info, node, node.links[name], spec)
            elif name in node.inputs:
                yield from _check_value(node, name, node.inputs[name], spec, graph=graph, nearest=nearest)
            elif spec.required and not spec.dynamic:
                unknown = [given for given in node.inputs if given not in declared.inputs]
                close = nearest.among(name, unknown) if unknown else ()
                text = "is required and missing" + (f" (is {shown(close[0])} meant for it?)" if close else "")
                yield _finding(node, name, "required_input_missing", text, allowed=_allowed(spec))


def _check_link(graph: Graph, info: ObjectInfo, node: Node, link: Link, spec: InputSpec) -> Iterator[Finding]:
    source = graph.get(link.source)
    declared = info.get(source.class_type) if source else None
    if source is None or declared is None or declared.outputs is None:
        return  # told elsewhere, or nothing to hold it against
    count = len(declared.outputs)
    # Python's rule, for that is what ComfyUI does: -1 is the last one, 0.0 is no index.
    if not isinstance(link.slot, int) or not -count <= link.slot < count:
        text = f"takes output {link.slot} of {source.class_type} ({source.id}), which has {count}"
        yield _finding(
            node, link.input, "slot_out_of_range", text, allowed={"min": 0, "max": count - 1} if count else None
        )
        return
    received = declared.outputs[link.slot]
    if not _fits(received, spec.type):
        text = f"needs {spec.type}, but output {link.slot} of {source.class_type} ({source.id}) is {received}"
        yield _finding(node, link.input, "return_type_mismatch", text, allowed=[spec.type])


def _fits(received: str, wanted: str) -> bool:
    """ComfyUI's rule: equal, `*`, or a type in common where either is a comma list. Newer wildcards always fit."""
    if received == wanted or "COMFY_" in received or "COMFY_" in wanted:
        return True
    offered = {kind.strip() for kind in received.split(",")}
    taken = {kind.strip() for kind in wanted.split(",")}
    return ANY in offered or ANY in taken or not offered.isdisjoint(taken)


def _check_value(
    node: Node, name: str, value: object, spec: InputSpec, *, graph: Graph, nearest: Nearest
) -> Iterator[Finding]:
    if spec.dynamic:
        return
    if isinstance(value, str) and is_source(node.class_type, name, value, spec):
        return  # it is fetched at its turn, and lies in no folder yet
    if isinstance(value, list) and not (spec.type == COMBO and spec.multiselect):
        hint = ""
        if len(value) == 2 and str(value[0]) in graph:
            hint = f'; node ids are texts, the slot is a number: ["{value[0]}", 0]'
        yield _finding(node, name, "bad_linked_input", f"is a list, but not a link [node id, slot]{hint}")
    elif spec.type in _SOCKETS:
        # Editors write null for what is not connected.
        if value is not None or spec.required:
            yield _finding(
                node, name, "link_expected", f"needs a link to a node that gives {spec.type}", allowed=[spec.type]
            )
    elif spec.type == COMBO:
        if spec.file and not isinstance(value, str):
            yield _finding(node, name, "invalid_input_type", f"is {shown(value)}, not the name of a file")
        elif spec.options is not None:
            yield from _check_choice(node, name, value, spec, options=spec.options, nearest=nearest)
    else:
        yield from _check_primitive(node, name, value, spec)


def _check_choice(
    node: Node, name: str, value: object, spec: InputSpec, *, options: Options, nearest: Nearest
) -> Iterator[Finding]:
    if spec.file and isinstance(value, str) and ("/" in value or annotated(value)[1]):
        return  # the list shows the top of one folder only; ComfyUI looks for the file itself
    for choice in value if isinstance(value, list) else [value]:
        if choice in options:
            continue
        close = nearest.among(choice, options.values)
        code, text = "value_not_in_list", f"is {shown(choice)}, which is not among the {len(options.values)} values"
        if spec.file:
            code, text = "input_file_missing", f"is {shown(choice)}, which is not in ComfyUI's folder"
        elif not options.values:
            text = f"is {shown(choice)}, and there is nothing to choose from: is a model missing?"
        yield _finding(node, name, code, text + _perhaps(close), allowed=_allowed(spec), suggestions=close)
        return


def _check_primitive(node: Node, name: str, value: Any, spec: InputSpec) -> Iterator[Finding]:
    convert = _CONVERSIONS.get(spec.type)
    if convert is int or convert is float:
        try:
            value = convert(value)
        except (TypeError, ValueError, OverflowError):
            kind = "a whole number" if convert is int else "a number"
            yield _finding(node, name, "invalid_input_type", f"is {shown(value)}, not {kind}", allowed=_allowed(spec))
            return
    if not isinstance(value, int | float):
        return
    if spec.min is not None and value < spec.min:
        text = f"is {shown(value)}, less than the least value {shown(spec.min)}"
        yield _finding(node, name, "value_smaller_than_min", text, allowed=_allowed(spec))
    elif spec.max is not None and value > spec.max:
        text = f"is {shown(value)}, more than the greatest value {shown(spec.max)}"
        yield _finding(node, name, "value_bigger_than_max", text, allowed=_allowed(spec))


def _finding(
    node: Node,
    name: str,
    code: str,
    text: str,
    *,
    severity: Literal["error", "warning"] = "warning",
    allowed: object = None,
    suggestions: tuple[str, ...] = (),
) -> Finding:
    return Finding(
        code=code,
        message=f"{node.class_type} ({node.id}): {name} {text}.",
        pointer=pointer(node.id, "inputs", name),
        severity=severity,
        node_id=node.id,
        class_type=node.class_type,
        input=name,
        allowed=allowed,
        suggestions=suggestions,
    )


def _allowed(spec: InputSpec) -> object:
    if spec.options is not None:
        return list(spec.options.values[:_MAX_ALLOWED])
    bounds = {"min": spec.min, "max": spec.max}
    return {key: bound for key, bound in bounds.items() if bound is not None} or None


def _perhaps(suggestions: Sequence[str]) -> str:
    return f" (perhaps {', '.join(map(shown, suggestions))})" if suggestions else ""
