"""The template of a path, for requests that never reach the app's own routing: refused ones (401, 429), and 405.

Must never decide anything: the app routes, this only names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from litestar.routes import BaseRoute


class RouteNames:
    """Which route a path would have matched; built once, when all routes are there."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._fixed: dict[str, str] = {}
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        for route in routes:
            if route.path_parameters:
                self._patterns.append((_pattern(route), route.path_format))
            else:
                self._fixed[route.path_format] = route.path_format

    def of(self, path: str) -> str | None:
        """`/v1/tasks/{task_id}` for `/v1/tasks/7`; None where there is no such route."""
        path = path.rstrip("/") or "/"
        if path in self._fixed:
            return self._fixed[path]
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), None)


def _pattern(route: BaseRoute) -> re.Pattern[str]:
    parts = (
        re.escape(part) if isinstance(part, str) else (".+" if part.full.endswith(":path") else "[^/]+")
        for part in route.path_components
    )
    return re.compile("/" + "/".join(parts), re.DOTALL)
