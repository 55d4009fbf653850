"""OPTIONS: which methods a path knows. Litestar's own answer names only those of the handler it met first.

Must never answer a browser's preflight: `management_api.cors` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from litestar import Request, Response, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute


def options_route(handlers: Iterable[object]) -> HTTPRouteHandler:
    """For all paths of these handlers. Register it before them, or Litestar makes one of its own."""
    paths = sorted({path for handler in handlers if isinstance(handler, HTTPRouteHandler) for path in handler.paths})

    @route(paths, http_method=HttpMethod.OPTIONS, include_in_schema=False, sync_to_thread=False, status_code=204)
    def options(request: Request[Any, Any, Any]) -> Response[None]:
        template = request.scope["path_template"]
        allowed: set[str] = set()
        for known in request.app.routes:
            if isinstance(known, HTTPRoute) and (known.path_format or "/") == template:
                allowed |= known.methods
        return Response(None, headers={"allow": ", ".join(sorted(allowed))})

    return options
