"""What a scrape says, by name and labels."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import Metric

Sample = tuple[str, frozenset[tuple[str, str]]]


def sample(name: str, /, **labels: str) -> Sample:
    return name, frozenset(labels.items())


def total(status: str) -> Sample:
    return sample("comfyui_workflow_total", status=status)


def nodes(node_type: str) -> Sample:
    return sample("comfyui_node_duration_seconds_count", node_type=node_type)


def values(families: Iterable[Metric]) -> dict[Sample, float]:
    """Every sample of the service's own that may be compared: no buckets, no ages, nothing of HTTP or the process."""
    return {
        sample(one.name, **one.labels): one.value
        for family in families
        for one in family.samples
        if not one.name.endswith("_bucket")
        and not one.name.startswith(("http_", "process_", "api_", "comfyui_backend_silent_"))
    }
