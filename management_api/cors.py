"""Which web pages may call from a browser (CONTRACT 1): none but our own, unless origins are configured.

Must never reflect an origin that was not configured. Outside the app, so that refusals carry the headers too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Header = tuple[bytes, bytes]

_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE"
_REQUEST_HEADERS = (
    b"Accept, Authorization, Content-Type, Idempotency-Key, If-Modified-Since, If-None-Match, If-Range, "
    b"Last-Event-ID, Prefer, Range, X-API-Key, X-Request-Id"
)
_REPLY_HEADERS = (
    b"Accept-Ranges, Allow, Content-Disposition, Content-Range, ETag, Idempotency-Replayed, Location, "
    b"Preference-Applied, Retry-After, WWW-Authenticate, X-RateLimit-Limit, X-RateLimit-Remaining, "
    b"X-RateLimit-Reset, X-Request-Id"
)
_VARY: Header = (b"vary", b"Origin")


class Cors:
    """The configured origins; `*` lets every page call. Keys travel in headers, so credentials are never needed."""

    def __init__(self, origins: Collection[str]) -> None:
        self._all = "*" in origins
        self._origins = frozenset(origin.lower().rstrip("/").encode() for origin in origins)
        self.enabled = bool(origins)

    def headers(self, request: Sequence[Header]) -> list[Header]:
        """What every reply to this request gets."""
        allowed = self._allowed(request)
        if allowed is None:
            return [_VARY]
        return [_VARY, (b"access-control-allow-origin", allowed), (b"access-control-expose-headers", _REPLY_HEADERS)]

    def preflight(self, method: str, request: Sequence[Header]) -> list[Header] | None:
        """The headers of a 204 when this is a browser's question whether it may ask; else None."""
        if method != "OPTIONS" or not any(name == b"access-control-request-method" for name, _ in request):
            return None
        vary = (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers")
        allowed = self._allowed(request)
        if allowed is None:
            return [vary]
        return [
            vary,
            (b"access-control-allow-origin", allowed),
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _REQUEST_HEADERS),
            (b"access-control-max-age", b"600"),
        ]

    def _allowed(self, request: Sequence[Header]) -> bytes | None:
        origin = next((value for name, value in request if name == b"origin"), None)
        if origin is None:
            return None
        if self._all:
            return b"*"
        return origin if origin.lower() in self._origins else None
