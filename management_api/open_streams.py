"""How many streams one client may hold open: WebSockets and server-sent events, each of which costs memory for hours.

Must never count what is short. Synchronous on purpose, as `limits` is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from management_api.limits import Network, client_of

_VARIABLE = "MANAGEMENT_API_MAX_SOCKETS"


class TooManyStreams(Exception):
    """The message is for the client."""


class OpenStreams:
    """Counts them by client address (IPv6: by /64); `limit` 0 is no limit."""

    def __init__(self, limit: int, allow: Sequence[Network] = ()) -> None:
        self._limit = limit
        self._allow = tuple(allow)
        self._open: Counter[str] = Counter()

    @contextmanager
    def one(self, address: str) -> Iterator[None]:
        """While one is open. Raises `TooManyStreams`."""
        client = client_of(address, self._allow) if self._limit else None
        if client is None:
            yield
            return
        if self._open[client] >= self._limit:
            raise TooManyStreams(f"{self._limit} streams are open from this address; {_VARIABLE} allows no more")
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


def is_stream(scope: Any) -> bool:
    """A request that may stay open for as long as the client likes."""
    if scope["type"] == "websocket":
        return True
    return scope["method"] == "GET" and any(
        name == b"accept" and b"text/event-stream" in value for name, value in scope["headers"]
    )
