"""The one clock and the one id maker. They are passed in, so that tests own time and names."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

IdMaker = Callable[[], str]

_random = random.Random()  # noqa: S311 - seeded by the system; ids are names, not secrets, and come by the thousand


class Clock(Protocol):
    """Wall time for what is told, monotonic time for what is measured."""

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now_ms(self) -> int:
        """Epoch milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()


def new_id() -> str:
    """A canonical lower-case UUID, the only form newer ComfyUI servers accept (PROTOCOL §2, §8).

    Version 7 (RFC 9562): it begins with the time, so that an index of ids grows at its end. Random ids touch a page
    of their own each, and cost the store up to half its rate.
    """
    bits = _random.getrandbits(74)
    number = (time.time_ns() // 1_000_000) << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0x2 << 62 | bits & (1 << 62) - 1
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
