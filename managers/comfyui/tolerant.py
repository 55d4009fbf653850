"""JSON as Python writes it, read all the same.

ComfyUI answers with Python's `json.dumps`, which writes NaN, Infinity and halves of surrogate pairs. One such value
of anybody's node must not make an answer unreadable that holds everybody's. Pure.

Must never give out what is no JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_PATH = "fullpath"
"""Where some nodes say a path of that machine."""


def decode(content: bytes | str, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode it; where that fails once more after `repaired`. Raises `msgspec.DecodeError`."""
    try:
        try:
            return decoder.decode(content)
        except msgspec.DecodeError:
            return decoder.decode(repaired(content))
    except RecursionError as error:
        raise msgspec.DecodeError("nested too deeply") from error


def without_paths(content: bytes | str) -> bytes | str:
    """The same without any `fullpath`, which is for nobody else to know. Raises `msgspec.DecodeError`."""
    if _PATH in content if isinstance(content, str) else _PATH.encode() in content:
        return repaired(content, _drop_path)
    return content


def repaired(content: bytes | str, hook: Callable[[dict[str, Any]], Any] | None = None) -> bytes:
    """The same as strict JSON: null for what is no number, `?` for what is no character.

    Each object goes through `hook`, the inner ones first. Raises `msgspec.DecodeError`.
    """
    try:
        text = content if isinstance(content, str) else content.decode(errors="replace")
        value = json.loads(text, parse_constant=_nothing, parse_float=_finite, object_hook=hook)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    except (ValueError, RecursionError) as error:
        raise msgspec.DecodeError(f"no JSON: {error}") from error


def _drop_path(found: dict[str, Any]) -> dict[str, Any]:
    found.pop(_PATH, None)
    return found


def _nothing(_: str) -> None:
    return None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
