"""Where things lie in the bucket: pure, and the same for the same run however often it is asked.

Must never let a name that ComfyUI or a client chose leave the folder of its workflow.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import quote

from managers.events.types import Output

METADATA = "metadata.json"

_ODD = re.compile(r"[^\w.-]+")
_LONGEST = 180  # bytes of UTF-8: a key may have 1,024, and a file system behind it 255 a name


def folder(prefix: str, workflow_id: str) -> str:
    """The folder of a workflow, without a slash at either end."""
    return "/".join(part for part in (prefix.strip("/"), "jobs", workflow_id) if part)


def names(outputs: Sequence[Output]) -> dict[int, str]:
    """A safe name for each output that is a file, by its number; no two are the same, in whatever case."""
    taken = {METADATA}
    found: dict[int, str] = {}
    for n, output in enumerate(outputs):
        if output.filename is not None:
            name = wanted = safe(output.filename)
            stem, dot, ending = wanted.rpartition(".")
            count = 1
            while name.lower() in taken:
                count += 1
                name = f"{stem}-{count}.{ending}" if dot else f"{wanted}-{count}"
            taken.add(name.lower())
            found[n] = name
    return found


def safe(filename: str) -> str:
    """Letters, digits, `.`, `_` and `-`; all else is one `_`. Never hidden, empty or longer than a name may be."""
    name = _ODD.sub("_", unicodedata.normalize("NFC", filename)).lstrip(".") or "_"
    stem, dot, ending = name.rpartition(".")
    if dot and stem and len(ending.encode()) < _LONGEST // 2:
        return f"{_cut(stem, _LONGEST - len(ending.encode()) - 1)}.{ending}"
    return _cut(name, _LONGEST)


def disposition(name: str, *, inline: bool) -> str:
    """The header under which a browser shows or saves it (RFC 6266)."""
    kind = "inline" if inline else "attachment"
    plain = name.encode("ascii", "replace").decode().replace("?", "_")
    extended = "" if name.isascii() else f"; filename*=UTF-8''{quote(name)}"
    return f'{kind}; filename="{plain}"{extended}'


def _cut(text: str, length: int) -> str:
    return text.encode()[:length].decode(errors="ignore")
