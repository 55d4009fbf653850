"""Webhooks as people manage them: endpoints that are made, changed, tried out and taken away, and their secrets.

Must never give a secret out twice, but for the one that the service as a whole has, which an admin may look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import structlog
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from managers.clock import Clock, IdMaker
from managers.delivery.office import Deliveries
from managers.delivery.port import Delivered
from managers.delivery.store import Endpoint, Secret, WebhookStore
from managers.delivery.webhook_signing import new_secret
from managers.delivery.webhooks import (
    Dress,
    EndpointDestination,
    Sender,
    WorkflowDestination,
    as_stored,
    body_of,
    signers,
)
from managers.errors import Conflict, InvalidRequest, NotFound, StoreUnavailable
from managers.events.types import AnyStoredEvent, Finding
from managers.guard import Forbidden

log = structlog.get_logger(__name__)

MAX_ENDPOINTS = 100
"""Each reads the log for itself."""
OVERLAP_MS = 86_400_000
"""So long an old secret signs beside the new one."""
TYPES: tuple[str, ...] = tuple(str(kind.__struct_config__.tag) for kind in get_args(AnyStoredEvent))
"""The events that are stored, and so can be delivered."""
PATTERNS = (*TYPES, *dict.fromkeys(kind.partition(":")[0] + ":*" for kind in TYPES), "*")
"""What an endpoint may ask for."""
ALL_OF_WORKFLOWS = ("workflow:*",)
TEST_TYPE = "webhook:test"


class EndpointView(Struct, frozen=True, kw_only=True, rename="camel"):
    """An endpoint as clients see it. `disabledReason`: why it is not enabled, when nobody asked for that."""

    id: str
    url: str
    events: tuple[str, ...]
    description: str | None
    enabled: bool
    disabled_reason: str | None
    created_at: int


class EndpointMade(EndpointView, frozen=True, kw_only=True, rename="camel"):
    """The same with its secret: this once."""

    secret: str


class Tried(Struct, frozen=True, kw_only=True, rename="camel"):
    """What came of a test call."""

    delivered: bool
    status: int | None
    error: str | None


class SecretView(Struct, frozen=True, kw_only=True, rename="camel"):
    """The secret of the service as a whole. The one before it signs too until `previousUntil` (epoch ms)."""

    secret: str
    previous_until: int | None


class Change(Struct, frozen=True, kw_only=True):
    """What is to be another."""

    url: str | UnsetType = UNSET
    events: Sequence[str] | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class Webhooks:
    """`open` it once `deliveries` can take destinations, `aclose` it after them."""

    def __init__(
        self,
        *,
        store: WebhookStore,
        deliveries: Deliveries,
        sender: Sender,
        clock: Clock,
        new_id: IdMaker,
        dress: Dress = as_stored,
    ) -> None:
        self._store = store
        self._deliveries = deliveries
        self._sender = sender
        self._clock = clock
        self._new_id = new_id
        self._dress = dress
        self._destinations: dict[str, EndpointDestination] = {}
        self._shared: Secret | None = None

    async def open(self) -> None:
        """Take up what there is. Raises `StoreUnavailable`."""
        once = WorkflowDestination(self._sender, self._clock, self._store.urls, self._secret, self._dress)
        await self._deliveries.add(once)
        for endpoint in await self._store.endpoints():
            destination = self._destinations[endpoint.id] = self._destination(endpoint)
            await self._deliveries.add(destination)

    async def aclose(self) -> None:
        """Close connections."""
        await self._sender.aclose()

    # ---- endpoints

    async def create(self, url: str, events: Sequence[str], description: str | None) -> EndpointMade:
        """A new one, which hears what is stored from now on. Raises `InvalidRequest`, `Conflict` for too many."""
        _check_events(events)
        await self.check(url, "/url")
        if len(self._destinations) >= MAX_ENDPOINTS:
            raise Conflict(f"There are {MAX_ENDPOINTS} webhooks already, and may be no more", "full")
        endpoint = Endpoint(
            id=self._new_id(),
            url=url,
            events=tuple(dict.fromkeys(events)),
            description=description,
            secret=new_secret(),
            created_at=self._clock.now_ms(),
        )
        try:
            self._destinations[endpoint.id] = self._destination(endpoint)  # now: others may be made meanwhile
            await self._store.keep(endpoint)
            await self._deliveries.add(self._destinations[endpoint.id])
        except BaseException:
            del self._destinations[endpoint.id]
            raise
        return _made(endpoint)

    def list(self) -> tuple[EndpointView, ...]:
        """All, oldest first."""
        return tuple(_view(one.endpoint) for one in self._destinations.values())

    def get(self, endpoint_id: str) -> EndpointView:
        """Raises `NotFound`."""
        return _view(self._find(endpoint_id).endpoint)

    async def change(self, endpoint_id: str, change: Change) -> EndpointView:
        """From now on, also for what is to be tried again. Raises `NotFound`, `InvalidRequest`."""
        destination = self._find(endpoint_id)
        endpoint = destination.endpoint
        if change.events is not UNSET:
            _check_events(change.events)
            endpoint = replace(endpoint, events=tuple(dict.fromkeys(change.events)))
        if change.url is not UNSET:
            await self.check(change.url, "/url")
            endpoint = replace(endpoint, url=change.url)
        if change.description is not UNSET:
            endpoint = replace(endpoint, description=change.description)
        if change.enabled is not UNSET:
            endpoint = replace(endpoint, enabled=change.enabled, disabled_reason=None)
        await self._deliveries.mark(destination.name)
        await self._keep(endpoint)
        return _view(endpoint)

    async def delete(self, endpoint_id: str) -> None:
        """It hears no more, what is pending is dead. Raises `NotFound`."""
        destination = self._find(endpoint_id)
        await self._deliveries.remove(destination.name, "The webhook was deleted")
        await self._store.remove(endpoint_id)
        self._destinations.pop(endpoint_id, None)

    async def rotate(self, endpoint_id: str) -> EndpointMade:
        """Another secret; the old one signs too for a day. Raises `NotFound`."""
        endpoint = self._find(endpoint_id).endpoint
        now = self._clock.now_ms()
        endpoint = replace(endpoint, secret=new_secret(), old_secret=endpoint.secret, old_until=now + OVERLAP_MS)
        await self._keep(endpoint)
        return _made(endpoint)

    async def test(self, endpoint_id: str) -> Tried:
        """Call it now, once, also when it is disabled. Raises `NotFound`."""
        endpoint = self._find(endpoint_id).endpoint
        now = self._clock.now_ms()
        body = body_of(TEST_TYPE, b'{"timestamp":%d,"webhookId":"%s"}' % (now, endpoint.id.encode()))
        outcome = await self._sender.send(endpoint.url, signers(endpoint, now), self._new_id(), body)
        if isinstance(outcome, Delivered):
            return Tried(delivered=True, status=outcome.status, error=None)
        return Tried(delivered=False, status=outcome.status, error=outcome.reason)

    # ---- what single workflows need

    async def check(self, url: str, pointer: str) -> None:
        """Whether this may be called. Raises `InvalidRequest` that points at where it stands in the body."""
        try:
            await self._sender.guard.check(url)
        except Forbidden as error:
            message = str(error)
            raise InvalidRequest(message, [Finding(code="invalid_url", message=message, pointer=pointer)]) from None

    async def shared_secret(self) -> SecretView:
        """What calls to the URLs of workflows are signed with; made when it is first asked for."""
        secret = await self._secret()
        return SecretView(secret=secret.secret, previous_until=self._until(secret))

    async def rotate_shared_secret(self) -> SecretView:
        """Another one; the old one signs too for a day."""
        old, now = await self._secret(), self._clock.now_ms()
        secret = Secret(secret=new_secret(), old_secret=old.secret, old_until=now + OVERLAP_MS)
        await self._store.keep_shared_secret(secret)
        self._shared = secret
        return SecretView(secret=secret.secret, previous_until=self._until(secret))

    # ---- inside

    def _destination(self, endpoint: Endpoint) -> EndpointDestination:
        return EndpointDestination(endpoint, self._sender, self._clock, self._gone, self._dress)

    async def _keep(self, endpoint: Endpoint) -> None:
        destination = self._find(endpoint.id)
        destination.endpoint = endpoint  # first: what another change begins with
        await self._store.keep(endpoint)

    async def _gone(self, endpoint_id: str) -> None:
        """It answered 410."""
        destination = self._destinations.get(endpoint_id)
        if destination is not None and destination.endpoint.enabled:
            reason = "It answered 410: it wants to hear no more"
            log.warning("a webhook is disabled", id=endpoint_id, reason=reason)
            try:
                await self._keep(replace(destination.endpoint, enabled=False, disabled_reason=reason))
            except StoreUnavailable as error:  # it will answer the same after the next start
                log.warning("that cannot be written down", id=endpoint_id, reason=str(error))

    async def _secret(self) -> Secret:
        if self._shared is None:
            self._shared = await self._store.shared_secret(new_secret())
        return self._shared

    def _until(self, secret: Secret) -> int | None:
        until = secret.old_until
        return until if until is not None and until > self._clock.now_ms() else None

    def _find(self, endpoint_id: str) -> EndpointDestination:
        destination = self._destinations.get(endpoint_id)
        if destination is None:
            raise NotFound(f"Webhook {endpoint_id} not found")
        return destination


def _check_events(events: Sequence[str]) -> None:
    for n, pattern in enumerate(events):
        if pattern not in PATTERNS:
            message = f"No event is called {pattern[:64]!r}; known: {', '.join(PATTERNS)}"
            found = Finding(code="unknown_event", message=message, pointer=f"/events/{n}", allowed=list(PATTERNS))
            raise InvalidRequest(message, [found])
    if not events:
        message = "events names no event"
        raise InvalidRequest(message, [Finding(code="invalid_value", message=message, pointer="/events")])


def _view(endpoint: Endpoint) -> EndpointView:
    return EndpointView(
        id=endpoint.id,
        url=endpoint.url,
        events=endpoint.events,
        description=endpoint.description,
        enabled=endpoint.enabled,
        disabled_reason=endpoint.disabled_reason,
        created_at=endpoint.created_at,
    )


def _made(endpoint: Endpoint) -> EndpointMade:
    return EndpointMade(
        id=endpoint.id,
        url=endpoint.url,
        events=endpoint.events,
        description=endpoint.description,
        enabled=endpoint.enabled,
        disabled_reason=endpoint.disabled_reason,
        created_at=endpoint.created_at,
        secret=endpoint.secret,
    )
