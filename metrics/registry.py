"""The registry all metrics of this process live in, and its text (CONTRACT 8).

Must never be the library's global one: two apps in one process (tests) would count into each other.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder


def new_registry() -> CollectorRegistry:
    """A registry with the process_* defaults, and without a `_created` series beside each counter."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text of all metrics and its content type: OpenMetrics when `accept` asks for it, else Prometheus text."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number, or stands in quotes
        encode, content_type = choose_encoder("")
    return encode(registry), content_type
