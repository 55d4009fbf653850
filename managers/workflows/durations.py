"""How long nodes take, learnt from what ran: by class, number of steps and backend. Pure: no clock, no I/O.

Each kind has a histogram of buckets that grow by a fifth, in which what is older counts less: some 25 durations
decide, so that it follows a new card or driver within a day. First loads of a model and warm runs are in the same
histogram: the median tells the usual case, the 90 % mark shows that there are others. Must never grow without bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from msgspec import Struct

from managers.comfyui.tracker import GraphNode

RATIO = 1.2
KEPT = 0.96
"""What a duration still weighs after the next one of its kind."""
MAX_KINDS = 2000
"""Kinds that are remembered; those that ran longest ago go first."""
TRIVIAL = 0.1
"""Nodes of no more weight than this (`nodes.weight`) take no time to speak of: they need not be known."""

_SHORTEST = 0.001  # seconds; events carry milliseconds
_LEAST = 0.01
_LOG_RATIO = math.log(RATIO)


class Kind(Struct, frozen=True, gc=False):
    """What is counted together. `steps` is a power of two, 0 where the graph names no number of steps."""

    class_type: str
    steps: int
    backend: str


class NodeDuration(Struct, frozen=True, kw_only=True):
    """What is known of a kind, as it is kept: weights by bucket, and the weight of those found in the cache."""

    kind: Kind
    counts: dict[int, float]
    cached: float
    learnt_at: int


class Estimate(Struct, frozen=True, gc=False):
    """A time to come: its median in seconds, and the square of the distance from there to its 90 % mark.

    Medians of parts are added, and so are these squares, as variances of independent parts are. With one long part,
    the usual case, that is exact. Adding the 90 % marks would take for granted that all goes wrong at once; drawing
    lots would cost much and know no more, as the parts' dependence is not known either. docs/metrics.md tells how
    well it holds (`comfyui_eta_total`).
    """

    seconds: float = 0.0
    spread: float = 0.0

    @property
    def p90(self) -> float:
        """Nine of ten take no longer, in seconds."""
        return self.seconds + math.sqrt(self.spread)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, self.spread + other.spread)

    def times(self, count: float) -> Estimate:
        """So many of these, one after another."""
        return Estimate(self.seconds * count, self.spread * count)


class Histogram:
    """The durations of one kind. Seconds everywhere."""

    def __init__(self, counts: dict[int, float] | None = None, cached: float = 0.0) -> None:
        self.counts = counts or {}
        self.cached = cached
        self._whole: Estimate | None = None
        self._expected: Estimate | None = None

    def add(self, seconds: float | None) -> None:
        """One more; None: it was found in the cache, which is no duration."""
        self._whole = self._expected = None
        self.cached *= KEPT
        counts = {bucket: left for bucket, count in self.counts.items() if (left := count * KEPT) >= _LEAST}
        if seconds is None:
            self.cached += 1
            counts = counts or self.counts  # the last that is known of its time stays
        else:
            bucket = int(math.log(max(seconds, _SHORTEST) / _SHORTEST) / _LOG_RATIO)
            counts[bucket] = counts.get(bucket, 0.0) + 1
        self.counts = counts

    def quantile(self, share: float, longer_than: float = 0.0) -> float:
        """How long it takes in this share of the cases; of those that take longer than `longer_than`.

        Where none ever took so long, that is all there is to say.
        """
        parts = []
        for bucket in sorted(self.counts):
            low, high = _SHORTEST * RATIO**bucket, _SHORTEST * RATIO ** (bucket + 1)
            if high > longer_than:
                inside = math.log(high / max(low, longer_than)) / _LOG_RATIO
                parts.append((max(low, longer_than), high, self.counts[bucket] * min(inside, 1.0)))
        wanted = share * sum(weight for _, _, weight in parts)
        for low, high, weight in parts:
            if weight >= wanted and weight > 0:
                return max(low * math.pow(high / low, wanted / weight), longer_than)
            wanted -= weight
        return parts[-1][1] if parts else longer_than

    @property
    def whole(self) -> Estimate:
        """A run of it that is not found in the cache."""
        if self._whole is None:
            self._whole = _estimate(self.quantile(0.5), self.quantile(0.9))
        return self._whole

    @property
    def expected(self) -> Estimate:
        """The same where nobody knows yet whether it is in the cache: as often as it was before."""
        if self._expected is None:
            ran = sum(self.counts.values())
            hit = self.cached / (self.cached + ran)
            marks = [0.0 if share <= hit else self.quantile((share - hit) / (1 - hit)) for share in (0.5, 0.9)]
            self._expected = _estimate(*marks)
        return self._expected


class Known(Struct, frozen=True, gc=False):
    """The durations that tell about a node, and how much longer than them it takes (for more steps)."""

    histogram: Histogram
    scale: float

    def whole(self) -> Estimate:
        """From its beginning to its end."""
        return _scaled(self.histogram.whole, self.scale)

    def expected(self) -> Estimate:
        """The same, when it may be in the cache."""
        return _scaled(self.histogram.expected, self.scale)

    def left(self, elapsed: float) -> Estimate:
        """What is left after so many seconds: the cases that were over by then are out of the question."""
        past = elapsed / self.scale
        marks = [self.histogram.quantile(share, past) - past for share in (0.5, 0.9)]
        return _scaled(_estimate(*marks), self.scale)

    def shortest(self) -> float:
        """Hardly ever was it quicker."""
        return self.histogram.quantile(0.05) * self.scale


class Durations:
    """What is known of all kinds."""

    def __init__(self, rows: Iterable[NodeDuration] = ()) -> None:
        """`rows` as they were kept, those learnt last at the end."""
        self._kinds: dict[Kind, Histogram] = {}  # the one that ran last is last
        self._classes: dict[str, dict[Kind, Histogram]] = {}
        for row in rows:
            self._put(row.kind, Histogram(dict(row.counts), row.cached))

    def learn(self, node: GraphNode, backend: str, seconds: float | None) -> Kind:
        """A node took so long, or was cached (None). Which kind that was."""
        kind = Kind(node.class_type, _power_of_two(node.steps), backend)
        histogram = self._kinds.pop(kind, None) or Histogram()
        histogram.add(None if seconds is None else seconds / _scale(node.steps, kind))
        self._put(kind, histogram)
        return kind

    def shrink(self) -> list[Kind]:
        """Forget what is too much; what that was."""
        dropped = []
        while len(self._kinds) > MAX_KINDS:
            kind = next(iter(self._kinds))
            dropped.append(kind)
            del self._kinds[kind], self._classes[kind.class_type][kind]
            if not self._classes[kind.class_type]:
                del self._classes[kind.class_type]
        return dropped

    def rows(self, kinds: Iterable[Kind], now: int) -> list[NodeDuration]:
        """What is to be kept of these kinds. `now` is epoch ms."""
        return [
            NodeDuration(kind=kind, counts=found.counts, cached=found.cached, learnt_at=now)
            for kind in kinds
            if (found := self._kinds.get(kind)) is not None
        ]

    def known(self, class_type: str, steps: int | None, backend: str) -> Known | None:
        """What is known of such a node; None: its class never ran.

        Where it never ran there with about as many steps, the nearest number of steps counts, in proportion; and
        where it never ran there at all, what it took elsewhere: the steps it makes there will correct that.
        """
        kinds = self._classes.get(class_type)
        if not kinds:
            return None
        wanted = _power_of_two(steps)
        exact = kinds.get(Kind(class_type, wanted, backend))
        if exact is not None and exact.counts:
            return Known(exact, _scale(steps, Kind(class_type, wanted, backend)))
        kind = min(
            kinds, key=lambda kind: (not kinds[kind].counts, kind.backend != backend, _far(kind.steps, wanted))
        )
        return Known(kinds[kind], _scale(steps, kind))

    def _put(self, kind: Kind, histogram: Histogram) -> None:
        self._kinds[kind] = histogram
        self._classes.setdefault(kind.class_type, {})[kind] = histogram


def _estimate(median: float, mark: float) -> Estimate:
    return Estimate(median, (mark - median) ** 2)


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    return estimate if scale == 1 else Estimate(estimate.seconds * scale, estimate.spread * scale * scale)


def _power_of_two(steps: int | None) -> int:
    return 2 ** round(math.log2(steps)) if steps and steps > 0 else 0


def _scale(steps: int | None, kind: Kind) -> float:
    return steps / kind.steps if steps and steps > 0 and kind.steps else 1.0


def _far(steps: int, wanted: int) -> float:
    return abs(math.log2(max(steps, 1) / max(wanted, 1)))
