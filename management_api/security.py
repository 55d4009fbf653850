"""Who may come in (CONTRACT 1): the open paths, and the key in its several clothes.

Works on the raw ASGI scope, so that it sees every request, also those no route knows. Must never log or raise what
it was shown, and compares in constant time.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import parse_qs

from litestar.enums import ScopeType
from litestar.types import Scope

TicketChecker = Callable[[str], bool]

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/healthz", "/readyz", "/metrics", "/docs"})
OPEN_TREES = ("/docs/",)


def is_open(path: str, *, metrics_auth: bool = False) -> bool:
    """Whether a path is served without a key."""
    path = path.rstrip("/") or "/"
    if path == "/metrics" and metrics_auth:
        return False
    return path in OPEN_PATHS or path.startswith(OPEN_TREES)


def is_limited(method: str, path: str) -> bool:
    """Whether requests to it are counted: everything but probes, metrics, documentation and output files."""
    if path.startswith("/v1/"):
        if method not in {"GET", "HEAD"}:
            return True
        if path.startswith("/v1/comfyui/output/"):
            return False
        return not (path.startswith("/v1/comfyui/workflow/") and "/outputs/" in path)
    path = path.rstrip("/")
    return not path or not is_open(path)


class Authenticator:
    """Knows the key. `register_ticket_checker` is how the stream adds its single-use tickets."""

    def __init__(self, key: str, *, metrics_auth: bool = False) -> None:
        if not key:
            raise ValueError("a key is needed")
        self._key = key.encode()
        self._metrics_auth = metrics_auth
        self._check_ticket: TicketChecker | None = None

    def register_ticket_checker(self, check: TicketChecker) -> None:
        """`check` says whether a ticket is good, and uses it up. Asked for WebSockets and SSE only."""
        self._check_ticket = check

    def is_open(self, path: str) -> bool:
        """Whether this path is served without a key, as configured."""
        return is_open(path, metrics_auth=self._metrics_auth)

    def is_key(self, offered: bytes) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(offered, self._key)

    def authenticate(self, scope: Scope) -> bool:
        """Whether the request shows the key: X-API-Key, Authorization: Bearer, `bearer, <key>`, or `?ticket=`."""
        protocols = accept = b""
        for name, value in scope["headers"]:
            if name == b"x-api-key":
                if self.is_key(value):
                    return True
            elif name == b"authorization":
                scheme, _, offered = value.partition(b" ")
                if scheme.lower() == b"bearer" and self.is_key(offered.strip()):
                    return True
            elif name == b"sec-websocket-protocol":
                protocols += b"," + value
            elif name == b"accept":
                accept = value
        is_socket = scope["type"] == ScopeType.WEBSOCKET
        if is_socket and protocols and self._protocol_key(protocols):
            return True
        if is_socket or (b"text/event-stream" in accept and scope.get("method") == "GET"):
            return self._ticket(scope["query_string"])
        return False

    def _protocol_key(self, header: bytes) -> bool:
        offered = [part.strip() for part in header.split(b",") if part.strip()]
        return len(offered) >= 2 and offered[0].lower() == b"bearer" and self.is_key(offered[1])

    def _ticket(self, query: bytes) -> bool:
        if self._check_ticket is None or b"ticket=" not in query:
            return False
        try:
            tickets = parse_qs(query.decode("latin-1"), max_num_fields=100).get("ticket", [])
        except ValueError:  # more fields than anybody needs
            return False
        return len(tickets) == 1 and self._check_ticket(tickets[0])
