"""The port of what is kept about deliveries: how far each destination has read the log, and what it was given.

Must never name a database. Every coroutine that writes returns after the commit is on disk. All of them may raise
`StoreUnavailable`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from managers.delivery.port import Delivery


class State(StrEnum):
    """Where a delivery is: the last two are ends, and a replay makes it pending again."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class Record(Struct, frozen=True, kw_only=True):
    """One line of the delivery log. Times are epoch ms.

    `next_at` is None while it waits for an earlier one of its workflow, and when it has ended. `number` is the order
    in which they were made.
    """

    number: int
    id: str
    destination: str
    kind: str
    seq: int
    workflow_id: str | None
    type: str
    state: State
    attempts: int
    next_at: int | None
    last_error: str | None
    last_status: int | None
    created_at: int
    ended_at: int | None


class Result(Struct, frozen=True, kw_only=True):
    """What became of one try. Pending: it is tried again at `at`; else it ended then (epoch ms)."""

    id: str
    state: State
    attempts: int
    at: int
    error: str | None = None
    status: int | None = None


class Outlook(Struct, frozen=True):
    """What waits for a destination: when the next is due (None: none is), and the one that waits longest."""

    next_at: int | None
    oldest_seq: int | None
    oldest_at: int | None


class Filter(Struct, frozen=True, kw_only=True):
    """Which deliveries a list shows; `cursor` is what the page before gave."""

    state: State | None = None
    destination: str | None = None
    workflow_id: str | None = None
    limit: int = 50
    cursor: str | None = None


class Page(Struct, frozen=True):
    """Some deliveries, newest first, and where to go on."""

    records: tuple[Record, ...]
    next_cursor: str | None


class DeliveryStore(Protocol):
    """The cursors and the deliveries.

    Of those of one workflow to one destination only the first that is pending is ever due: the others have to wait
    until it has ended. Events that are about no workflow count as one.
    """

    async def attach(self, name: str, kind: str, start: int | None = None) -> int:
        """The cursor of a destination: the seq up to which it has read. A new one begins behind `start`; None: at
        the end of the log.
        """
        ...

    async def detach(self, name: str, reason: str, now: int) -> None:
        """Forget the cursor; what is pending is dead."""
        ...

    async def fan_out(self, name: str, cursor: int, deliveries: Sequence[Delivery], kind: str) -> None:
        """New deliveries, and the cursor behind them, in one transaction."""
        ...

    async def due(self, name: str, now: int, limit: int) -> Sequence[Delivery]:
        """What may be tried now, the longest due first; those that are under way too."""
        ...

    async def outlook(self, name: str, now: int) -> Outlook:
        """What waits, and the first that is due after `now`."""
        ...

    async def record(self, results: Sequence[Result], now: int) -> None:
        """What became of tries, in one transaction; a delivery that is pending no more stays as it is."""
        ...

    async def get(self, delivery_id: str) -> tuple[Record, bytes]:
        """One of them with its event as JSON text. Raises `NotFound`."""
        ...

    async def list(self, wanted: Filter) -> Page:
        """Newest first; the cursor is stable under inserts. Raises `InvalidRequest` for a cursor that is none."""
        ...

    async def retry(self, delivery_id: str, destinations: Collection[str], now: int) -> Record:
        """Due now, as if it were new; one that is pending only need not wait for its time any more.

        Raises `NotFound`, and `Conflict` unless its destination is one of these.
        """
        ...

    async def retry_dead(
        self, destinations: Collection[str], now: int, *, after: int, limit: int, workflow_id: str | None = None
    ) -> Sequence[int]:
        """Dead ones of these destinations are pending again: the numbers of the first ones with a greater number."""
        ...

    async def prune(self, before_ms: int | None, *, limit: int, heard: int | None) -> int:
        """One short transaction: forget up to `limit` that were delivered before this, and dead ones of which the
        log has forgotten the event. 0: none is left. (`managers.workflows.retention.Prunable`)
        """
        ...


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where somebody wants to be called. Times are epoch ms.

    `old_secret` signs too until `old_until`. `disabled_reason`: why it is not `enabled`, when we did that.
    """

    id: str
    url: str
    events: tuple[str, ...]
    description: str | None
    secret: str
    created_at: int
    old_secret: str | None = None
    old_until: int | None = None
    enabled: bool = True
    disabled_reason: str | None = None


class Secret(Struct, frozen=True, kw_only=True):
    """A secret, and the one before it until it ends (epoch ms)."""

    secret: str
    old_secret: str | None = None
    old_until: int | None = None


class WebhookStore(Protocol):
    """The endpoints, and what workflows and the service as a whole have of them."""

    async def endpoints(self) -> Sequence[Endpoint]:
        """All, oldest first."""
        ...

    async def keep(self, endpoint: Endpoint) -> None:
        """A new one, or what has become of it."""
        ...

    async def remove(self, endpoint_id: str) -> None:
        """It is no more."""
        ...

    async def shared_secret(self, made: str) -> Secret:
        """What calls for single workflows are signed with: `made`, if there is none yet."""
        ...

    async def keep_shared_secret(self, secret: Secret) -> None:
        """Another one from now on."""
        ...

    async def urls(self, workflow_ids: Collection[str]) -> dict[str, str]:
        """Whom to call about these workflows; those without such a wish are left out."""
        ...
