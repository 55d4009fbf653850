"""The JSON Schema (2020-12) of what a template takes: it admits what `parameter.judge` does, and nothing else.

Pure. There is one thing that it cannot say: where a list is empty because nothing is installed, it admits any text,
and the request is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import UNSET

from managers.templates.model import Kind, Version
from managers.templates.parameter import (
    COLOR_LENGTH,
    COLORS,
    ELSEWHERE,
    FILES,
    MAX_TEXT,
    NUMERIC,
    RANDOM,
    Parameter,
    installed,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(version: Version, found: Mapping[str, Parameter]) -> dict[str, Any]:
    """Of the body of POST /v1/generate/{template}."""
    told: dict[str, Any] = {
        "$schema": DIALECT,
        "title": version.name,
        "type": "object",
        "properties": {name: of_parameter(parameter) for name, parameter in found.items()},
        "additionalProperties": False,
    }
    if version.definition.description:
        told["description"] = version.definition.description
    if required := [name for name, parameter in found.items() if parameter.required]:
        told["required"] = required
    return told


def example(found: Iterable[Parameter]) -> dict[str, Any]:
    """A request that is right: all that must be given, and what people change first."""
    told: dict[str, Any] = {}
    for parameter in found:
        if parameter.required:
            told[parameter.name] = _sample(parameter)
        elif parameter.kind in (Kind.STRING, Kind.COLOR, Kind.SEED) and parameter.options is None:
            told[parameter.name] = parameter.default
    return told


def of_parameter(parameter: Parameter) -> dict[str, Any]:
    """One property."""
    told: dict[str, Any] = {"type": parameter.json_type}
    if parameter.kind in NUMERIC:
        told |= _range(parameter)
    elif parameter.kind in (Kind.STRING, Kind.FILE):
        told["maxLength"] = MAX_TEXT
    elif parameter.kind is Kind.COLOR:
        told |= {"pattern": COLORS, "maxLength": COLOR_LENGTH}
    if parameter.options:
        listed = {"enum": list(parameter.options)}
        if parameter.kind is Kind.FILE:
            told["anyOf"] = [listed, {"pattern": ELSEWHERE}]
        elif parameter.kind is Kind.SEED:
            told["enum"] = list(dict.fromkeys((RANDOM, *parameter.options)))
        else:
            told |= listed
    elif parameter.kind is Kind.FILE:
        told["pattern"] = FILES
    if parameter.default is not UNSET:
        told["default"] = parameter.default
    if words := _words(parameter):
        told["description"] = words
    return told


def _range(parameter: Parameter) -> dict[str, Any]:
    limits = {"minimum": parameter.minimum, "maximum": parameter.maximum}
    if parameter.kind is not Kind.SEED or parameter.minimum == RANDOM:
        return limits
    if parameter.minimum == RANDOM + 1:
        return limits | {"minimum": RANDOM}
    return {"anyOf": [{"const": RANDOM}, limits]}


def _words(parameter: Parameter) -> str:
    parts = [parameter.description] if parameter.description else []
    if parameter.kind is Kind.SEED:
        parts.append("-1: a random one, which is told.")
    if parameter.kind is Kind.FILE:
        parts.append("A file in ComfyUI's input folder.")
    if parameter.options is not None and not parameter.options:
        parts.append("Nothing of the kind is installed.")
    if len(parameter.backends) > 1 and len(set(parameter.backends.values())) > 1:
        parts.append(f"By backend: {installed(parameter)}.")
    return " ".join(parts)


def _sample(parameter: Parameter) -> Any:
    if parameter.options:
        return parameter.options[0]
    match parameter.kind:
        case Kind.INTEGER | Kind.NUMBER | Kind.SEED:
            low, high = parameter.minimum or 0, parameter.maximum or 0
            return max(low, min(high, 1))
        case Kind.BOOLEAN:
            return True
        case Kind.COLOR:
            return "#3366cc"
        case Kind.FILE:
            return "picture.png"
    return "a lighthouse at dusk"
