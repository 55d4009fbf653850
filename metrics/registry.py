"""The registry all metrics of this process live in, and its text (CONTRACT 8).

Must never be the library's global one: two apps in one process (tests) would count into each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

_END = b"# EOF\n"


def new_registry() -> CollectorRegistry:
    """A registry with the process_* defaults, and without a `_created` series beside each counter."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class Written(Metric):
    """A family that writes its text itself: for those so large that the library takes too long over them.

    It has no samples for the library; `text`, with its HELP and TYPE, is called in a thread.
    """

    def __init__(self, name: str, documentation: str, kind: str, body: Callable[[], bytes]) -> None:
        super().__init__(name, documentation, kind)
        self._body = body

    def text(self) -> bytes:
        """As it stands in a reply."""
        head = f"# HELP {self.name} {self.documentation}\n# TYPE {self.name} {self.type}\n"
        return head.encode() + self._body()


def lines(samples: Iterable[Sample]) -> bytes:
    """These as text: of histograms and gauges it is the same in both formats."""
    return "".join(
        f"{sample.name}{{{','.join(map(_label, sorted(sample.labels.items())))}}} {_number(sample.value)}\n"
        for sample in samples
    ).encode()


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _label(pair: tuple[str, str]) -> str:
    value = pair[1].replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{pair[0]}="{value}"'


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
    families: list[Metric] = []
    written: list[Written] = []
    for family in registry.collect():
        if isinstance(family, Written):
            written.append(family)
        else:
            families.append(family)
        await asyncio.sleep(0)

    def write() -> bytes:
        text = encode(_Collected(families))
        head = text.removesuffix(_END)
        return b"".join((head, *(family.text() for family in written), text[len(head) :]))

    return await asyncio.to_thread(write), content_type
