"""Templates that lie in folders: `<name>.json`, each with what PUT /v1/templates/{name} takes.

Blocks: call it in a thread. Must never let one bad file keep the others out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from managers.templates.check import check
from managers.templates.model import Definition, is_name
from managers.templates.store import Found

BOX = Path(__file__).parent / "boxed"
MAX_BYTES = 10 * 2**20

_decoder = msgspec.json.Decoder(Definition)


class Broken(Struct, frozen=True):
    """A file that is no template, and why."""

    path: Path
    reason: str


def read_folder(folder: Path) -> Iterator[Found | Broken]:
    """All of a folder, in the order of their names; none where there is no folder."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        yield Broken(folder, error.strerror or type(error).__name__)
        return
    for path in paths:
        try:
            yield Found(path.stem, _read(path))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            yield Broken(path, reason or type(error).__name__)


def _read(path: Path) -> Definition:
    if not is_name(path.stem):
        raise ValueError("its name is none for a template: lower-case letters, digits and hyphens, like portrait-2")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    definition = _decoder.decode(text)
    findings = check(definition, msgspec.json.decode(definition.graph), [])
    if findings:
        raise ValueError("; ".join(f"{finding.pointer}: {finding.message}" for finding in findings[:3]))
    return definition
