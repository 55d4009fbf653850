"""What a ComfyUI's `/object_info` says of its node classes, decoded once into small values (PROTOCOL §2).

Keeps only what validation and naming need, and shares equal option lists: a machine with 10,000 LoRAs names them in
every loader class. Must never fetch anything, and never refuse a catalogue because one custom node describes itself
oddly: such a class is kept as one of which nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from managers.comfyui import tolerant

COMBO = "COMBO"
ANY = "*"


class Options(Struct, frozen=True, eq=False):
    """The values a list input takes: in the order ComfyUI shows them, and as a set for looking up."""

    values: tuple[Any, ...]
    members: frozenset[Any]

    def __contains__(self, value: object) -> bool:
        try:
            return value in self.members
        except TypeError:  # a list or an object: not hashable, so not among the members
            return value in self.values


class InputSpec(Struct, frozen=True, eq=False):
    """One declared input of a class. `type` is `COMBO` for lists of values in either notation.

    `options` is None when the values are not known here: no list, or one the web page fetches elsewhere.
    """

    type: str
    required: bool = True
    options: Options | None = None
    min: float | None = None
    max: float | None = None
    file: bool = False
    multiselect: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether the input arrives under other names (`images.image0`), as those of newer servers do."""
        return self.type.startswith("COMFY_")


class NodeClass(Struct, frozen=True, eq=False):
    """A node class. `outputs` are its type names by slot, None when it did not say."""

    name: str
    display_name: str | None = None
    inputs: Mapping[str, InputSpec] = {}
    outputs: tuple[str, ...] | None = None
    output_node: bool = False


ObjectInfo = Mapping[str, NodeClass]

_json: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class Catalog(Struct, frozen=True, eq=False):
    """What one backend offers. `object_info` is None while the backend is away: it then counts as able."""

    name: str
    object_info: ObjectInfo | None = None


def decode_object_info(body: bytes | str) -> dict[str, NodeClass]:
    """Decode the answer of `GET /object_info` or `/object_info/{class}` (`{}` for an unknown class).

    Raises `msgspec.DecodeError` when it is no JSON, `msgspec.ValidationError` when it is no object.
    """
    classes: dict[str, Any] = tolerant.decode(body, _json)
    return read_object_info(classes)


def read_object_info(classes: Mapping[str, Any]) -> dict[str, NodeClass]:
    """The same for an answer that is decoded already."""
    pool: dict[tuple[Any, ...], Options] = {}
    return {name: _node_class(name, info, pool) for name, info in classes.items() if isinstance(info, dict)}


def _node_class(name: str, info: dict[str, Any], pool: dict[tuple[Any, ...], Options]) -> NodeClass:
    declared = info.get("input")
    inputs: dict[str, InputSpec] = {}
    # Hidden inputs are left out: ComfyUI fills them itself and ignores what a graph says there.
    for section, required in (("required", True), ("optional", False)):
        specs = declared.get(section) if isinstance(declared, dict) else None
        for key, spec in specs.items() if isinstance(specs, dict) else ():
            if key not in inputs:
                inputs[key] = _input_spec(spec, required, pool)
    outputs = info.get("output")
    display_name = info.get("display_name")
    return NodeClass(
        name=name,
        display_name=display_name if isinstance(display_name, str) and display_name else None,
        inputs=inputs,
        outputs=tuple(_type_name(kind) for kind in outputs) if isinstance(outputs, list) else None,
        output_node=info.get("output_node") is True,
    )


def _input_spec(spec: object, required: bool, pool: dict[tuple[Any, ...], Options]) -> InputSpec:
    if not isinstance(spec, list) or not spec:
        return InputSpec(type=ANY, required=required)
    extra = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    values = spec[0] if isinstance(spec[0], list) else None if extra.get("remote") else extra.get("options")
    kind = _type_name(spec[0])
    return InputSpec(
        type=kind,
        required=required,
        options=_options(values, pool) if kind == COMBO and isinstance(values, list) else None,
        min=_number(extra.get("min")),
        max=_number(extra.get("max")),
        file=any((key == "upload" or key.endswith("_upload")) and flag is True for key, flag in extra.items()),
        multiselect=extra.get("multiselect") is True,
    )


def _options(values: list[Any], pool: dict[tuple[Any, ...], Options]) -> Options:
    key = tuple(values)
    try:
        found = pool.get(key)
    except TypeError:
        return Options(key, frozenset(value for value in key if not isinstance(value, list | dict)))
    if found is None:
        found = pool[key] = Options(key, frozenset(key))
    return found


def _type_name(kind: object) -> str:
    if isinstance(kind, list):
        return COMBO
    return kind if isinstance(kind, str) else ANY


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
