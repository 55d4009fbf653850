"""Tickets for browsers, which can set no header on a WebSocket or an EventSource (CONTRACT 1).

A ticket stands for the key that asked for it. Must never keep a ticket in clear: what is held in memory is its hash.
A restart forgets all of them.
"""

from __future__ import annotations

import hashlib
import secrets

from msgspec import Struct

from managers.callers import Caller
from managers.clock import Clock
from managers.errors import Unavailable


class Ticket(Struct, frozen=True, rename="camel"):
    """Good once, until `expires_at` (epoch ms). 256 random bits."""

    ticket: str
    expires_at: int


class Tickets:
    """Issues and takes back. At most `limit` are open at a time."""

    def __init__(self, clock: Clock, *, seconds: float = 60, limit: int = 10_000) -> None:
        self._clock = clock
        self._seconds = seconds
        self._limit = limit
        self._open: dict[bytes, tuple[float, Caller]] = {}  # hash -> end, in order of both issue and end

    def issue(self, caller: Caller) -> Ticket:
        """A new one for this caller. Raises `Unavailable` when too many are open."""
        self._forget_expired()
        if len(self._open) >= self._limit:
            raise Unavailable("Too many tickets are open", retry_after=self._seconds)
        ticket = secrets.token_urlsafe(32)
        self._open[_digest(ticket)] = (self._clock.monotonic() + self._seconds, caller)
        return Ticket(ticket, self._clock.now_ms() + int(self._seconds * 1000))

    def redeem(self, ticket: str) -> Caller | None:
        """Whose it was; None when it was not good. From now on it is not."""
        self._forget_expired()
        _, caller = self._open.pop(_digest(ticket), (0.0, None))
        return caller

    def _forget_expired(self) -> None:
        now = self._clock.monotonic()
        while self._open:
            oldest = next(iter(self._open))
            if self._open[oldest][0] > now:
                return
            del self._open[oldest]


def _digest(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).digest()
