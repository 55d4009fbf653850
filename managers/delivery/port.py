"""What leaves the house: a delivery, what a destination is, and what it may answer.

Must never know a protocol: webhooks, S3 and EventBridge are destinations like any other. The outcomes may carry the
status that a peer gave (`status`), and a destination may be a `Chooser`; both can be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from managers.events.log import StoredFrame


class Delivery(Struct, frozen=True, kw_only=True):
    """One stored event on its way to one destination. `id` stays the same over all tries; times are epoch ms."""

    id: str
    destination: str
    event: StoredFrame
    attempts: int = 0
    created_at: int = 0


class Delivered(Struct, frozen=True):
    """It has it. `status` is an HTTP status, where there is one."""

    status: int | None = None


class Again(Struct, frozen=True):
    """It has it not, and may want it later: in `after` seconds, or when the destination's schedule says."""

    reason: str
    after: float | None = None
    status: int | None = None


class Refused(Struct, frozen=True):
    """It will never want it: the delivery is dead until somebody replays it."""

    reason: str
    status: int | None = None


Outcome = Delivered | Again | Refused


class Destination(Protocol):
    """Somebody who is to hear of stored events. All of it is called on the event loop.

    `name` is unique and lasts over restarts (`s3`, `eventbridge`, `webhook:<id>`); `kind` is a metric's label.
    `schedule`: seconds before the second, third … try; after the last one the delivery is dead.
    `batch`: how many deliveries one call may get. `parallel`: how many calls may be under way at once; those of one
    workflow are made one after another, in the order of `seq`.
    """

    name: str
    kind: str
    schedule: Sequence[float]
    batch: int
    parallel: int

    def wants(self, event: StoredFrame) -> bool:
        """Whether this event is for it. Cheap, and always the same for the same event."""
        ...

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """Try; one outcome for each, in order. Has time limits of its own and raises nothing but `CancelledError`."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """A destination that has to look something up before it knows what it wants."""

    async def choose(self, events: Sequence[StoredFrame]) -> Sequence[StoredFrame]:
        """Those that are for it, of some that it `wants`, in order; always the same ones. May raise
        `StoreUnavailable`: it is asked again then.
        """
        ...
