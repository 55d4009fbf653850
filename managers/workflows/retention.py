"""Forgets what ended long ago: one task that takes small steps, so that nobody who hands work in notices it.

Must never touch what waits or runs, nor an event that somebody has not heard yet; the store knows how, this only asks
for the next step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
from msgspec import Struct

from managers.clock import Clock
from managers.errors import StoreUnavailable

log = structlog.get_logger(__name__)

DAY_MS = 86_400_000


class RetentionConfig(Struct, frozen=True, kw_only=True):
    """How many days records are kept (0: for ever), and the pace: rows a step, steps a round, rests in seconds."""

    days: int = 30
    step_rows: int = 100
    round_steps: int = 1000
    step_rest_seconds: float = 0.05
    idle_seconds: float = 300


class Prunable(Protocol):
    """What forgetting needs of a store."""

    async def prune(self, before_ms: int | None, *, limit: int, heard: int | None) -> int:
        """One short transaction: forget up to `limit` things that are older than this (epoch ms). 0: none is left.

        First the log, from its beginning and up to the seq `heard` (None: to its end), then workflows that are final
        and have no event left in it, with all that belongs to them; then what else has had its day, and room that
        is free. None for `before_ms`: only these last. The newest event and the newest workflow always stay.
        Raises `StoreUnavailable`.
        """
        ...


class Retention:
    """The one who sweeps. `run` it once, as a task."""

    def __init__(
        self,
        config: RetentionConfig,
        store: Prunable,
        clock: Clock,
        *,
        heard: Callable[[], int | None] = lambda: None,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`heard` is the seq of the slowest destination: what it has not heard is kept, with its workflow."""
        self._config = config
        self._store = store
        self._clock = clock
        self._heard = heard
        self._pause = pause

    async def run(self) -> None:
        """Sweep now, and again and again until cancelled. What goes wrong is told, and tried again later."""
        while True:
            done = True
            try:
                done = await self.sweep()
            except StoreUnavailable as error:
                log.warning("cannot forget old records, trying again later", reason=str(error))
            except Exception:
                log.exception("forgetting old records failed, trying again later")
            if done:
                await self._pause(self._config.idle_seconds)

    async def sweep(self) -> bool:
        """One round: whether nothing is left to forget. Raises `StoreUnavailable`."""
        config, rows = self._config, 0
        before = self._clock.now_ms() - config.days * DAY_MS if config.days else None
        try:
            for _ in range(config.round_steps):
                count = await self._store.prune(before, limit=config.step_rows, heard=self._heard())
                if not count:
                    return True
                rows += count
                await self._pause(config.step_rest_seconds)
            return False
        finally:
            if rows:
                log.info("forgot old records", count=rows)
