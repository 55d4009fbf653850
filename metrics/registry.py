"""The registry all metrics of this process live in, and its text (CONTRACT 8).

Must never be the library's global one: two apps in one process (tests) would count into each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric


def new_registry() -> CollectorRegistry:
    """A registry with the process_* defaults, and without a `_created` series beside each counter."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class _Collected:
    """Families of metrics, for an encoder."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """See the library's `Collector`."""
        return self._families


async def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text of all metrics and its content type: OpenMetrics when `accept` asks for it, else Prometheus text.

    Values are read on the event loop, where nothing changes meanwhile, with a turn for others after each family; the
    text is made in a thread.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number, or stands in quotes
        encode, content_type = choose_encoder("")
    families = []
    for family in registry.collect():
        families.append(family)
        await asyncio.sleep(0)
    return await asyncio.to_thread(encode, _Collected(families)), content_type
