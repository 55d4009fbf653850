"""Who may come in (CONTRACT 1): the open paths, the keys in their several clothes, and what each key may do.

`Authenticator` works on the raw ASGI scope, so that it sees every request, also those no route knows. `ScopeGate`
works behind the router, on the template of the route: there are many ways to write a path, but only one template.
Must never log or raise what it was shown, and compares in constant time.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import parse_qs

from litestar.enums import ScopeType
from litestar.exceptions import PermissionDeniedException, WebSocketException
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Receive, Scope, Send

from management_api.keys import KeyRing
from managers.callers import ADMIN, Caller, KeyScope

TicketChecker = Callable[[str], Caller | None]

_STREAMS = ("/events", "/logs/stream")
"""How the paths of server-sent events end."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})
CHANGES = (
    ("/v1/comfyui/stream/ticket", KeyScope.READ),  # nothing but another way to read
    ("/v1/templates/propose", KeyScope.READ),  # nothing is stored
    ("/v1/templates", KeyScope.ADMIN),
    ("/v1/comfyui/queue", KeyScope.ADMIN),
    ("/v1/comfyui/backends", KeyScope.ADMIN),
    ("/v1/comfyui/output/", KeyScope.ADMIN),
    ("/v1/comfyui/workflow/retry", KeyScope.ADMIN),
    ("/v1/deliveries", KeyScope.ADMIN),
    ("/v1/webhooks", KeyScope.ADMIN),
    ("/v1/tasks", KeyScope.ADMIN),  # they run programs
)
"""What the methods that change something need, by the beginning of the route's template; all else is `submit`."""
SECRETS = ("/v1/webhooks",)  # addresses that others gave us are as good as keys to them
"""What only an admin may read, by the beginning of the route's template."""

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/healthz", "/readyz", "/metrics", "/docs", "/dashboard"})
OPEN_TREES = ("/docs/", "/dashboard/")


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


@lru_cache
def needed_scope(method: str, template: str) -> KeyScope:
    """The scope that an operation needs: the one rule for all of them, for those to come too."""
    if method in READING:
        return KeyScope.ADMIN if template.startswith(SECRETS) else KeyScope.READ
    return next((scope for beginning, scope in CHANGES if template.startswith(beginning)), KeyScope.SUBMIT)


class ScopeGate(ASGIMiddleware):
    """Lets a caller through to the routes it has the scope for."""

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """ASGI, behind the router. 403 names the scope that lacks; no caller: the path is open."""
        caller: Caller | None = scope.get("auth")
        if caller is not None:
            needed = needed_scope(scope.get("method", "GET"), scope["path_template"])
            if not caller.may(needed):
                detail = f"The key {caller.name} has not the scope {needed}, which this needs"
                if scope["type"] == ScopeType.WEBSOCKET:
                    raise WebSocketException(code=4403, detail=detail)
                told = f'Bearer error="insufficient_scope", scope="{needed}"'  # RFC 6750
                raise PermissionDeniedException(detail, headers={"www-authenticate": told})
        await next_app(scope, receive, send)


class Authenticator:
    """Knows the keys. `register_ticket_checker` is how the stream adds its single-use tickets."""

    def __init__(self, key: str, named: KeyRing | None = None, *, metrics_auth: bool = False) -> None:
        if not key:
            raise ValueError("a key is needed")
        self._key = key.encode()
        self._admin = Caller(name=ADMIN, scopes=frozenset(KeyScope))
        self._named = named
        self._metrics_auth = metrics_auth
        self._check_ticket: TicketChecker | None = None

    def register_ticket_checker(self, check: TicketChecker) -> None:
        """`check` says whose ticket it is, and uses it up. Asked for WebSockets and SSE only."""
        self._check_ticket = check

    def is_open(self, path: str) -> bool:
        """Whether this path is served without a key, as configured."""
        return is_open(path, metrics_auth=self._metrics_auth)

    def authenticate(self, scope: Scope) -> Caller | None:
        """Whose key the request shows: X-API-Key, Authorization: Bearer, `bearer, <key>`, or `?ticket=`."""
        protocols = accept = b""
        for name, value in scope["headers"]:
            if name == b"x-api-key":
                if caller := self._owner(value):
                    return caller
            elif name == b"authorization":
                scheme, _, offered = value.partition(b" ")
                if scheme.lower() == b"bearer" and (caller := self._owner(offered.strip())):
                    return caller
            elif name == b"sec-websocket-protocol":
                protocols += b"," + value
            elif name == b"accept":
                accept = value
        is_socket = scope["type"] == ScopeType.WEBSOCKET
        if is_socket and protocols and (caller := self._protocol_owner(protocols)):
            return caller
        is_stream = scope.get("method") == "GET" and scope["path"].rstrip("/").endswith(_STREAMS)
        if is_socket or (is_stream and b"text/event-stream" in accept):
            return self._ticket(scope["query_string"])
        return None

    def _owner(self, offered: bytes) -> Caller | None:
        if hmac.compare_digest(offered, self._key):
            return self._admin
        return self._named.find(offered) if self._named is not None else None

    def _protocol_owner(self, header: bytes) -> Caller | None:
        offered = [part.strip() for part in header.split(b",") if part.strip()]
        if len(offered) >= 2 and offered[0].lower() == b"bearer":
            return self._owner(offered[1])
        return None

    def _ticket(self, query: bytes) -> Caller | None:
        if self._check_ticket is None or b"ticket=" not in query:
            return None
        try:
            tickets = parse_qs(query.decode("latin-1"), max_num_fields=100).get("ticket", [])
        except ValueError:  # more fields than anybody needs
            return None
        if len(tickets) != 1:
            return None
        caller = self._check_ticket(tickets[0])
        return caller if caller is not None and caller.welcome() else None
