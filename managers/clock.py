"""The one clock and the one id maker. They are passed in, so that tests own time and names."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Protocol

IdMaker = Callable[[], str]


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
    """A canonical lower-case UUID, the only form newer ComfyUI servers accept (PROTOCOL §2, §8)."""
    return str(uuid.uuid4())
