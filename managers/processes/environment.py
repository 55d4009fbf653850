"""What a program gets of the service's environment: what is on a list, and no more.

Must never hand on a secret of the service, whatever the list says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

ALWAYS = ("PATH", "HOME", "LANG")
_OURS = ("MANAGEMENT_API_", "AWS_")


def forbidden(name: str, withheld: frozenset[str]) -> bool:
    """Whether the service keeps this variable to itself."""
    return name in withheld or name.startswith(_OURS)


def allowed(environ: Mapping[str, str], wanted: Iterable[str], withheld: frozenset[str]) -> dict[str, str]:
    """PATH, HOME, LANG, and what is `wanted` by name or pattern (`CUDA_*`), as far as it is there."""
    patterns = (*ALWAYS, *wanted)
    return {
        name: value
        for name, value in environ.items()
        if not forbidden(name, withheld) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }
