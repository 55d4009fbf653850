"""What leaves the house, by kind of destination: tries by their result, and how long the oldest waits.

Must never take the name of a destination as a label: there may be many. Everything read here lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from managers.delivery.office import Deliveries


class DeliveryMetrics:
    """A collector of the registry."""

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries

    def collect(self) -> Iterator[Metric]:
        """As it is now."""
        tries = CounterMetricFamily(
            "comfyui_deliveries",
            "Tries to deliver an event: delivered, failed (and tried again later), dead (given up).",
            labels=("kind", "result"),
        )
        for labels, count in self._deliveries.counts().items():
            tries.add_metric(labels, count)
        yield tries
        age = GaugeMetricFamily(
            "comfyui_delivery_age_seconds",
            "How long the oldest delivery that is pending waits; 0: none is.",
            labels=("kind",),
        )
        for kind, seconds in self._deliveries.ages().items():
            age.add_metric((kind,), seconds)
        yield age

    describe = collect
