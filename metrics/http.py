"""Requests, counted and timed (CONTRACT 8). Fed by the ASGI wrapper, once a request.

Labels are bounded: `route` is a path template or `unmatched`, unknown methods are `OTHER`. Must never see a path.
"""

from __future__ import annotations

from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram

DURATION_BUCKETS = (0.001, 0.005, 0.015, 0.05, 0.1, 0.5, 1.0, 5.0)
UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """http_requests_total, http_request_duration_seconds, api_errors_total."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route", "status_code")
        self._requests = Counter("http_requests_total", "HTTP requests answered.", labels, registry=registry)
        self._duration = Histogram(
            "http_request_duration_seconds",
            "Seconds from request to the end of its answer.",
            labels,
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self._errors = Counter(
            "api_errors_total", "Answers with status 400 and above.", ("error_type", "route"), registry=registry
        )
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def observe(self, method: str, route: str | None, status: int, seconds: float, *, timed: bool = True) -> None:
        """Count one answer. `route` is its template, None when no route matched; sockets are not `timed`."""
        key = (method if method in _METHODS else "OTHER", route or UNMATCHED, status)
        children = self._children.get(key)
        if children is None:
            labels = (key[0], key[1], str(status))
            children = self._children[key] = (self._requests.labels(*labels), self._duration.labels(*labels))
        children[0].inc()
        if timed:
            children[1].observe(seconds)
        if status >= 400:
            self._errors.labels(error_type(status), key[1]).inc()


def error_type(status: int) -> str:
    """`not_found` for 404, and so on: the reason phrase, as a label."""
    try:
        return HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
    except ValueError:
        return f"status_{status}"
