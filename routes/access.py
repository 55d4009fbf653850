"""Who asks, for the routes. What a caller may do was decided before (`management_api.security`)."""

from __future__ import annotations

from typing import Any, cast

from litestar.connection import ASGIConnection

from managers.callers import NOBODY, Caller


def caller_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Caller:
    """The key that was shown, by its name; `NOBODY` where none is asked for."""
    return cast("Caller | None", connection.scope.get("auth")) or NOBODY
