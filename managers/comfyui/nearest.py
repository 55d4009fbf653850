"""The names most like one that was not found.

Must never cost more than it helps: machines list 10,000 file names, and a hostile graph could ask about thousands of
names. So one helper looks at a limited number of candidates, and remembers what it found.
"""

from __future__ import annotations

import difflib
import heapq
import itertools
import re
from collections.abc import Iterable, Sequence

_BUDGET = 10_000
_MAX_CANDIDATES = 5_000
_MAX_LENGTH = 200
_SHORTLIST = 20
_SHOWN = 3
_NOT_A_LETTER = re.compile(r"[\W_]+")


class Nearest:
    """Finds the nearest names during one validation."""

    def __init__(self) -> None:
        self._budget = _BUDGET
        self._found: dict[tuple[str, int], tuple[Sequence[object], tuple[str, ...]]] = {}

    def among(self, name: object, candidates: Sequence[object]) -> tuple[str, ...]:
        """Up to three texts of `candidates`, the best first; none once the budget is spent.

        Case, blanks and punctuation do not count. The same list must be the same object each time.
        """
        if not isinstance(name, str) or len(name) > _MAX_LENGTH:
            return ()
        key = (name, id(candidates))
        if key not in self._found and self._budget > 0:
            self._budget -= min(len(candidates), _MAX_CANDIDATES)
            # The list is kept beside the answer, so that its id stays its own.
            self._found[key] = (candidates, _search(name, candidates[:_MAX_CANDIDATES]))
        return self._found[key][1] if key in self._found else ()


def _search(name: str, candidates: Iterable[object]) -> tuple[str, ...]:
    wanted = _fold(name)
    pairs = _pairs(wanted)
    folded: dict[str, list[str]] = {}
    for candidate in candidates:
        if isinstance(candidate, str) and len(candidate) <= _MAX_LENGTH:
            folded.setdefault(_fold(candidate), []).append(candidate)
    # difflib alone takes 0.3 s for 5,000 similar names; letter pairs in common choose whom it looks at.
    likely = heapq.nlargest(_SHORTLIST, folded, key=lambda other: len(pairs & _pairs(other)) / (1 + len(other)))
    matches = difflib.get_close_matches(wanted, likely, n=_SHOWN, cutoff=0.6)
    return tuple(original for match in matches for original in folded[match])[:_SHOWN]


def _pairs(text: str) -> set[tuple[str, str]]:
    return set(itertools.pairwise(text))


def _fold(name: str) -> str:
    return _NOT_A_LETTER.sub("", name).casefold()
