"""From a path a client names to a file below the root, or to nothing.

Must never answer differently for what does not exist and for what lies outside: both are `NotFound`.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from managers.errors import NotFound

# NUL and other controls; `\`, which separates folders on some systems; surrogates, which are no UTF-8.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


def is_plain(name: str) -> bool:
    """Whether one part of a path may be listed, opened and deleted: not empty, not hidden, nothing but text."""
    return name != "" and not name.startswith(".") and _UNSAFE.search(name) is None


def locate(root: Path, path: str) -> tuple[Path, os.stat_result]:
    """The real place and the facts of the regular file `path` (relative, with `/`) below `root`.

    Links are resolved first: one that leaves the root leads nowhere. Raises `NotFound`. Blocks: call it in a thread.
    """
    missing = NotFound("Output not found")
    if not all(is_plain(name) for name in path.split("/")):  # also absolute ones: their first part is empty
        raise missing
    try:
        top = root.resolve(strict=True)
        place = (top / path).resolve(strict=True)
        facts = place.lstat()
    except (OSError, RuntimeError) as error:  # absent, over-long, closed to us; RuntimeError: links in a circle
        raise missing from error
    if not place.is_relative_to(top) or not stat.S_ISREG(facts.st_mode):
        raise missing
    return place, facts
