"""A template: a graph in API format, and which of its inputs are parameters, under what names and in what limits.

Must never do I/O, nor change: what is saved is a new version, and a version stays as it was saved.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

NAME = r"^[a-z0-9][a-z0-9-]{0,63}$"
ALIAS = r"^[a-z][a-z0-9-]{0,31}$"
PARAMETER = r"^[A-Za-z][A-Za-z0-9_]{0,63}$"
MAX_PARAMETERS = 200
MAX_ALIASES = 20
RESERVED = frozenset({"propose"})
"""Names that are paths already."""

Scalar = str | int | float | bool
_is_name, _is_alias = re.compile(NAME).fullmatch, re.compile(ALIAS).fullmatch
_REFERENCE = re.compile(r"(?P<name>[^@]+)(@(?P<version>[^@]+))?")


class Kind(StrEnum):
    """What a parameter is. `seed`: -1 is a random one. `color`: `#rrggbb`. `file`: the name of a file
    that stays in ComfyUI's folder, as an input picture."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    SEED = "seed"
    COLOR = "color"
    FILE = "file"


class Place(Struct, frozen=True):
    """An input of a node of the graph."""

    node: Annotated[str, Meta(min_length=1, max_length=1000)]
    input: Annotated[str, Meta(min_length=1, max_length=1000)]


class Input(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One parameter: where it goes (`also`: to these places too), and its limits, where they are narrower than
    what ComfyUI says. Without `default` it is the value in the graph; `""` stands for the first name of a list.
    """

    node: Annotated[str, Meta(min_length=1, max_length=1000)]
    input: Annotated[str, Meta(min_length=1, max_length=1000)]
    type: Kind | UnsetType = UNSET
    default: Scalar | UnsetType = UNSET
    minimum: int | float | UnsetType = UNSET
    maximum: int | float | UnsetType = UNSET
    enum: Annotated[tuple[Scalar, ...], Meta(min_length=1, max_length=1000)] | UnsetType = UNSET
    required: bool = False
    description: Annotated[str, Meta(max_length=1000)] = ""
    also: Annotated[tuple[Place, ...], Meta(max_length=50)] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Every input that it fills."""
        return (Place(self.node, self.input), *self.also)


class Definition(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is saved. `outputs` are the nodes whose outputs are the result; none: all of them."""

    graph: Annotated[Raw, Meta(extra_json_schema={"type": "object", "description": "In ComfyUI's API format."})]
    inputs: Annotated[
        dict[Annotated[str, Meta(pattern=PARAMETER)], Input],
        Meta(max_length=MAX_PARAMETERS, description="By the name of the parameter."),
    ] = {}
    outputs: tuple[Annotated[str, Meta(min_length=1, max_length=1000)], ...] = ()
    description: Annotated[str, Meta(max_length=4000)] = ""


class Source(StrEnum):
    """Where a version came from: by PUT, from a file at the start, or out of the box."""

    API = "api"
    FILE = "file"
    BOX = "box"


class Version(Struct, frozen=True, kw_only=True):
    """One saved version; they are numbered from 1, and numbers never come again. `created_at` is epoch ms."""

    name: str
    number: int
    created_at: int
    source: Source
    saved_by: str
    definition: Definition

    @property
    def reference(self) -> str:
        """Its name for people."""
        return f"{self.name}@{self.number}"

    def nodes(self) -> dict[str, Any]:
        """The graph, anew for each caller."""
        found: dict[str, Any] = msgspec.json.decode(self.definition.graph)
        return found


class Head(Struct, frozen=True, kw_only=True):
    """A template: its newest version, how many are kept, and its aliases."""

    newest: Version
    count: int
    aliases: dict[str, int]


def is_name(text: str) -> bool:
    """Whether a template may be called so."""
    return _is_name(text) is not None and text not in RESERVED


def is_alias(text: str) -> bool:
    """Whether an alias may be called so: never a number."""
    return _is_alias(text) is not None


def split_reference(text: str) -> tuple[str, str | None]:
    """`name@prod` or `name@3` in two; without `@` the second is None."""
    match = _REFERENCE.fullmatch(text)
    return (match["name"], match["version"]) if match else (text, None)


def digest(definition: Definition) -> str:
    """Two definitions with the same one are the same, whatever the order of their keys."""
    plain = msgspec.json.decode(msgspec.json.encode(definition))
    return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()
