"""Parameters into the graph of a version, or everything that is wrong with them.

Pure but for `random_seed`, which is handed in. Must never change the version, nor put a value anywhere but into the
inputs that the version names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from managers.comfyui.graph import shown
from managers.comfyui.nearest import Nearest
from managers.events.types import Finding
from managers.templates.model import Kind, Scalar, Version
from managers.templates.parameter import RANDOM, Parameter, choices, finding, installed, judge, plain, same

_EXACT = 2**53
"""Below this every reader of JSON has the same number."""

RandomBelow = Callable[[int], int]


class Filled(Struct, frozen=True):
    """A graph that is ready, and all its parameters as they were taken: defaults and the seed that was drawn too.

    `unfit` are the backends that do not have a model that was chosen.
    """

    graph: dict[str, Any]
    parameters: dict[str, Any]
    unfit: tuple[str, ...] = ()

    @property
    def seed(self) -> int | None:
        """The first seed among the parameters."""
        found = self.parameters.get("seed")
        return found if type(found) is int else None


def fill(
    version: Version, takes: Mapping[str, Parameter], given: Mapping[str, Any], random_below: RandomBelow
) -> Filled | list[Finding]:
    """Every value in its place. `takes`: what `resolve` says of this version."""
    nearest = Nearest()
    names = list(takes)
    wrong = [_unknown(name, names, nearest) for name in given if name not in takes]
    values: dict[str, Any] = {}
    for name, parameter in takes.items():
        if name not in given and parameter.required:
            wrong.append(_required(parameter))
            continue
        value = given.get(name, parameter.default)
        found = judge(parameter, value, nearest)
        if found is not None:
            wrong.append(found)
        values[name] = _drawn(parameter, random_below) if _is_random(parameter, value) else value
    if wrong:
        return wrong
    unfit = _unfit(takes, values)
    if isinstance(unfit, Finding):
        return [unfit]
    graph = version.nodes()
    for name, parameter in takes.items():
        value = plain(parameter, values[name])
        if parameter.kind in (Kind.INTEGER, Kind.SEED):
            values[name] = value
        for place in parameter.places:
            graph[place.node]["inputs"][place.input] = value
    return Filled(graph, values, unfit)


def _unfit(takes: Mapping[str, Parameter], values: Mapping[str, Any]) -> tuple[str, ...] | Finding:
    """The backends whose lists lack one of the values; a finding where none is left that has them all."""
    lacking: dict[str, str] = {}
    names: set[str] = set()
    for name, parameter in takes.items():
        names |= parameter.backends.keys()
        anywhere = any(_lists(options, values[name]) for options in parameter.backends.values())
        for backend, options in parameter.backends.items():
            if anywhere and not _lists(options, values[name]):
                lacking.setdefault(backend, name)
    if not lacking or len(lacking) < len(names):
        return tuple(lacking)
    told = "; ".join(f"{backend} has not {shown(values[name])} ({name})" for backend, name in lacking.items())
    return finding(
        takes[next(iter(lacking.values()))], "nowhere_together", f"and the others are nowhere together: {told}"
    )


def _lists(options: Sequence[Scalar], value: object) -> bool:
    return any(same(option, value) for option in options)


def _is_random(parameter: Parameter, value: object) -> bool:
    return parameter.kind is Kind.SEED and value == RANDOM


def _drawn(parameter: Parameter, random_below: RandomBelow) -> int:
    if parameter.options:
        numbers = [option for option in parameter.options if type(option) is int]
        return numbers[random_below(len(numbers))] if numbers else 0
    low = int(max(parameter.minimum or 0, 0))
    high = int(parameter.maximum if parameter.maximum is not None else _EXACT)
    return low + random_below(max(1, min(high, max(low, _EXACT - 1)) - low + 1))


def _unknown(name: str, names: list[str], nearest: Nearest) -> Finding:
    close = nearest.among(name, names)
    perhaps = f" (perhaps {', '.join(close)})" if close else ""
    message = f"There is no parameter {shown(name)}{perhaps}; known: {', '.join(names) or 'none'}"
    return Finding(
        code="unknown_parameter",
        message=message,
        pointer="/" + name[:1000].replace("~", "~0").replace("/", "~1"),
        allowed=names,
        suggestions=close,
    )


def _required(parameter: Parameter) -> Finding:
    text = "has to be given"
    if isinstance(parameter.unfit, str | int | float):
        text += f": its default {shown(parameter.unfit)} cannot be used here"
    if parameter.options is not None:
        return finding(parameter, "required", f"{text}; there are {installed(parameter)}", choices(parameter))
    return finding(parameter, "required", text)
