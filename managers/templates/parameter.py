"""One parameter of a template, and whether a value is one that it takes.

Pure. `schema` tells in JSON Schema what is decided here: the two must never differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, Struct

from managers.comfyui.graph import shown
from managers.comfyui.nearest import Nearest
from managers.events.types import Finding
from managers.templates.model import Kind, Place, Scalar

MAX_TEXT = 100_000
"""Characters of a text."""
INTEGERS = (-(2**63), 2**64 - 1)
NUMBERS = (-(2**53), 2**53)
COLORS = "^#[0-9a-fA-F]{6}$"
COLOR_LENGTH = 7
_PART = "[A-Za-z0-9_%-][A-Za-z0-9_ .()+%@,-]*"
FILES = f"^{_PART}(/{_PART})*( \\[(input|output|temp)\\])?$(?!\\n)"
"""Names that no loader follows out of its folder. (In Python `$` is also before a line feed at the end.)"""
ELSEWHERE = f"^({_PART}/)+{_PART}( \\[(input|output|temp)\\])?$(?!\\n)|^{_PART} \\[(input|output|temp)\\]$(?!\\n)"
"""Those of them that ComfyUI's list does not show: it is that of the top of one folder."""
RANDOM = -1
MAX_SHOWN = 100

_TYPES: dict[Kind, tuple[str, str]] = {
    Kind.STRING: ("a text", "string"),
    Kind.FILE: ("the name of a file", "string"),
    Kind.COLOR: ("a color, like #3366cc", "string"),
    Kind.INTEGER: ("a whole number", "integer"),
    Kind.SEED: ("a whole number, -1 for a random one", "integer"),
    Kind.NUMBER: ("a number", "number"),
    Kind.BOOLEAN: ("true or false", "boolean"),
}
NUMERIC = frozenset({Kind.INTEGER, Kind.NUMBER, Kind.SEED})


class Parameter(Struct, frozen=True, kw_only=True):
    """With all that is known of it. `default` UNSET: it has to be given; `unfit` then was its default, if it had any.

    `minimum_of` and `maximum_of` say whose limits they are. `options`: the values to choose from, None where any will
    do; `backends` are the lists of each backend that they come from, by its name.
    """

    name: str
    kind: Kind
    places: tuple[Place, ...]
    class_type: str
    description: str = ""
    default: Any = UNSET
    unfit: Any = UNSET
    minimum: int | float | None = None
    maximum: int | float | None = None
    minimum_of: str = ""
    maximum_of: str = ""
    options: tuple[Scalar, ...] | None = None
    backends: Mapping[str, tuple[Scalar, ...]] = {}

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is UNSET

    @property
    def json_type(self) -> str:
        """Its type in JSON Schema."""
        return _TYPES[self.kind][1]


def same(one: object, other: object) -> bool:
    """Equal as JSON values are: true is not 1, while 1.0 is."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def judge(parameter: Parameter, value: object, nearest: Nearest) -> Finding | None:
    """What is wrong with a value; None: it is taken."""
    if not _is(parameter.kind, value):
        return finding(parameter, "invalid_type", f"is {shown(value)}, not {_TYPES[parameter.kind][0]}")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        limit = {"max": MAX_TEXT}
        return finding(parameter, "text_too_long", f"has {len(value)} characters, not {MAX_TEXT} at most", limit)
    if isinstance(value, int | float) and parameter.kind in NUMERIC:
        if parameter.kind is Kind.SEED and value == RANDOM:
            return None
        if (found := _out_of_range(parameter, value)) is not None:
            return found
    if parameter.options is not None and not any(same(value, option) for option in parameter.options):
        if parameter.kind is Kind.FILE and isinstance(value, str) and re.search(ELSEWHERE, value):
            return None
        return _not_listed(parameter, value, nearest)
    if parameter.options is None and parameter.kind is Kind.FILE and not re.search(FILES, str(value)):
        return finding(parameter, "unsafe_file_name", f"is {shown(value)}, which may leave ComfyUI's folder")
    return None


def plain(parameter: Parameter, value: Any) -> Any:
    """The value as it goes into the graph."""
    match parameter.kind:
        case Kind.COLOR:
            return int(value[1:], 16)
        case Kind.INTEGER | Kind.SEED:
            return int(value)
    return value


def finding(
    parameter: Parameter, code: str, text: str, allowed: object = None, suggestions: tuple[str, ...] = ()
) -> Finding:
    """One finding about the value of a parameter. `text` follows its name."""
    return Finding(
        code=code,
        message=f"{parameter.name} {text}",
        pointer=f"/{parameter.name}",
        node_id=parameter.places[0].node,
        class_type=parameter.class_type,
        input=parameter.places[0].input,
        allowed=allowed,
        suggestions=suggestions,
    )


def installed(parameter: Parameter) -> str:
    """The values to choose from, in words: those of each backend where they are not the same for all."""
    lists = parameter.backends
    if len({tuple(map(repr, options)) for options in lists.values()}) > 1:
        return "; ".join(f"{name}: {_some(options)}" for name, options in lists.items())
    return _some(parameter.options or ())


def choices(parameter: Parameter) -> object:
    """The same as a value of `allowed`."""
    lists = parameter.backends
    if len({tuple(map(repr, options)) for options in lists.values()}) > 1:
        return {name: list(options[:MAX_SHOWN]) for name, options in lists.items()}
    return list((parameter.options or ())[:MAX_SHOWN])


def _is(kind: Kind, value: object) -> bool:
    match kind:
        case Kind.STRING | Kind.FILE:
            return isinstance(value, str)
        case Kind.COLOR:
            return isinstance(value, str) and len(value) == COLOR_LENGTH and re.search(COLORS, value) is not None
        case Kind.BOOLEAN:
            return isinstance(value, bool)
        case Kind.NUMBER:
            return isinstance(value, int | float) and not isinstance(value, bool)
    # JSON has one kind of number: 20.0 is a whole one.
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )


def _out_of_range(parameter: Parameter, value: float) -> Finding | None:
    low, high = parameter.minimum, parameter.maximum
    allowed = {"min": low, "max": high}
    if low is not None and value < low:
        text = f"is {shown(value)}; the least is {shown(low)}, says {parameter.minimum_of} ({_range(parameter)})"
        return finding(parameter, "value_smaller_than_min", text, allowed)
    if high is not None and value > high:
        text = f"is {shown(value)}; the most is {shown(high)}, says {parameter.maximum_of} ({_range(parameter)})"
        return finding(parameter, "value_bigger_than_max", text, allowed)
    return None


def _range(parameter: Parameter) -> str:
    return f"{shown(parameter.minimum)} to {shown(parameter.maximum)}"


def _not_listed(parameter: Parameter, value: object, nearest: Nearest) -> Finding:
    options = parameter.options or ()
    if not options:
        what = "ComfyUI's folder is empty" if parameter.kind is Kind.FILE else "nothing of the kind is installed"
        text = f"is {shown(value)}, and {what}"
        return finding(parameter, "value_not_in_list", text, choices(parameter))
    close = nearest.among(value, options)
    perhaps = f" (perhaps {', '.join(map(shown, close))})" if close else ""
    what = "which is not in ComfyUI's folder" if parameter.kind is Kind.FILE else "which is not there to choose"
    text = f"is {shown(value)}, {what}{perhaps}; there are {installed(parameter)}"
    code = "input_file_missing" if parameter.kind is Kind.FILE else "value_not_in_list"
    return finding(parameter, code, text, choices(parameter), close)


def _some(options: tuple[Scalar, ...]) -> str:
    if not options:
        return "none"
    more = f" and {len(options) - 10} more" if len(options) > 10 else ""
    return ", ".join(shown(option) for option in options[:10]) + more
