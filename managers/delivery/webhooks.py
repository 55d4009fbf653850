"""Webhooks after Standard Webhooks: what is sent, how an answer is judged, and the two kinds of receivers, standing
endpoints and the URL that a workflow was submitted with.

Must never follow a redirect, read more of an answer than its head, or tell a secret or a URL to anybody but the
receiver: URLs are secrets as often as not.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec
from msgspec import Raw, Struct

from managers.clock import Clock
from managers.delivery import webhook_signing
from managers.delivery.port import Again, Delivered, Delivery, Outcome, Refused
from managers.delivery.store import Endpoint, Secret
from managers.errors import StoreUnavailable
from managers.events.log import StoredFrame
from managers.guard import Forbidden, Guard, GuardedClient, Unresolved

SCHEDULE = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""Seconds before the second to the tenth try (5 s, 5 min, 30 min, 2, 5, 10, 14, 20, 24 h)."""
SECONDS = 15.0
"""That a try may take, all in all."""
MAX_BODY = 20_000
"""Bytes of a body; more is left out, and said to be."""
MAX_AFTER = 86400.0
KIND = "webhook"
ONCE = "webhook:workflow"
"""The destination of those URLs that belong to a workflow."""
ONCE_TYPES = frozenset({"workflow:started", "workflow:completed", "workflow:error", "workflow:cancelled"})

Dress = Callable[[Sequence[StoredFrame]], Awaitable[Sequence[StoredFrame]]]
"""Stored events as they are told now: with links that are good at this moment. May raise `StoreUnavailable`."""

_fields = msgspec.json.Decoder(dict[str, Raw])


class _Retry(Struct):
    will_retry: bool = msgspec.field(default=False, name="willRetry")


_will_retry = msgspec.json.Decoder(_Retry)


async def as_stored(events: Sequence[StoredFrame]) -> Sequence[StoredFrame]:
    """A `Dress` that changes nothing."""
    return events


def body_of(kind: str, event: bytes) -> bytes:
    """`{"type", "timestamp", "data"}` under 20 KB: `timestamp` is the event's as ISO 8601, `data` all else of it.

    Of more than that the largest fields are left out, and named in `data.truncated`.
    """
    data = _fields.decode(event)
    data.pop("type", None)
    timestamp = iso(msgspec.json.decode(data.pop("timestamp", Raw(b"0")), type=int))
    left_out: list[str] = []
    while True:
        told: dict[str, Any] = dict(data)
        if left_out:
            told["truncated"] = left_out
        body = msgspec.json.encode({"type": kind, "timestamp": timestamp, "data": told})
        if len(body) < MAX_BODY or not data:
            return body
        largest = max(data, key=lambda name: len(bytes(data[name])))
        del data[largest]
        left_out.append(largest)


def iso(milliseconds: int) -> str:
    """Epoch ms as ISO 8601 in UTC."""
    text = datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def retry_after(value: str | None, now_ms: int) -> float | None:
    """Seconds that a `Retry-After` asks for (a number, or a date), up to a day; None: it does not."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), MAX_AFTER)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - now_ms / 1000
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, seconds), MAX_AFTER) if math.isfinite(seconds) else None


def signers(secret: Endpoint | Secret, now_ms: int) -> list[str]:
    """The secrets that sign now: for a day after a change the old one too."""
    old = secret.old_secret
    if old is None or secret.old_until is None or now_ms >= secret.old_until:
        return [secret.secret]
    return [secret.secret, old]


class Sender:
    """Makes one call. All webhooks share it; it keeps no connection."""

    def __init__(self, guard: Guard, *, clock: Clock, agent: str, context: ssl.SSLContext | None = None) -> None:
        """`agent` is the User-Agent; `context` says which certificates are trusted, None: those of the system."""
        self.guard = guard
        self._clock = clock
        self._agent = agent
        self._client = GuardedClient(guard, seconds=SECONDS, context=context)

    async def aclose(self) -> None:
        """Close what is open."""
        await self._client.aclose()

    async def send(self, url: str, secrets: Sequence[str], message_id: str, body: bytes) -> Outcome:
        """Sign and POST. 2xx is delivered, all else is not; 410 means never again."""
        now = self._clock.now_ms()
        headers = {
            "content-type": "application/json",
            "user-agent": self._agent,
            **webhook_signing.headers(secrets, message_id, now // 1000, body),
        }
        try:
            async with asyncio.timeout(SECONDS):
                client = await self._client.get()
                async with client.stream("POST", url, content=body, headers=headers) as reply:
                    return _judged(reply.status_code, retry_after(reply.headers.get("retry-after"), now))
        except (Forbidden, Unresolved) as error:
            return Again(str(error))
        except (TimeoutError, httpx.TimeoutException):
            return Again(f"No answer within {SECONDS:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Again(_plain(error))


def _judged(status: int, after: float | None) -> Outcome:
    if 200 <= status < 300:
        return Delivered(status)
    if status == 410:
        return Refused("It answered 410: it wants to hear no more", status)
    if 300 <= status < 400:
        return Again(f"It answered {status}, and redirects are not followed", status=status)
    return Again(f"It answered {status}", after if status in (429, 503) else None, status)


def _plain(error: Exception) -> str:
    """Without addresses, which the messages of the system may hold."""
    match error:
        case httpx.ConnectError():
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ssl.SSLError):
                cause = cause.__cause__ or cause.__context__
            return (
                "No connection" if cause is None else "No connection: its certificate is no good, or it speaks no TLS"
            )
        case httpx.RemoteProtocolError():
            return "It closed the connection, or answered something else than HTTP"
        case _:
            return f"The call failed: {type(error).__name__}"


def patient(outcome: Outcome, attempts: int) -> Outcome:
    """`Retry-After` may make the next try later than the schedule says, never sooner: it would use up the tries."""
    if isinstance(outcome, Again) and outcome.after is not None and attempts < len(SCHEDULE):
        return msgspec.structs.replace(outcome, after=max(outcome.after, SCHEDULE[attempts]))
    return outcome


class EndpointDestination:
    """A standing endpoint; `endpoint` is exchanged when somebody changes it."""

    def __init__(
        self, endpoint: Endpoint, sender: Sender, clock: Clock, gone: Callable[[str], Awaitable[None]], dress: Dress
    ) -> None:
        """`gone` is told the id of one that wants to hear no more."""
        self.name = f"{KIND}:{endpoint.id}"
        self.kind = KIND
        self.schedule: Sequence[float] = SCHEDULE
        self.batch = 1
        self.parallel = 8
        self.endpoint = endpoint
        self._sender = sender
        self._clock = clock
        self._gone = gone
        self._dress = dress

    def wants(self, event: StoredFrame) -> bool:
        """As its filter says; nothing while it is disabled."""
        return self.endpoint.enabled and matches(self.endpoint.events, event.type)

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """One call for each."""
        return [await self._deliver(one) for one in deliveries]

    async def _deliver(self, delivery: Delivery) -> Outcome:
        endpoint = self.endpoint
        if not endpoint.enabled:
            return Refused("The endpoint is disabled")
        try:
            (event,) = await self._dress((delivery.event,))
        except StoreUnavailable as error:
            return Again(str(error))
        body = body_of(event.type, event.data)
        secrets = signers(endpoint, self._clock.now_ms())
        outcome = await self._sender.send(endpoint.url, secrets, delivery.id, body)
        if isinstance(outcome, Refused):
            await self._gone(endpoint.id)
        return patient(outcome, delivery.attempts)


class WorkflowDestination:
    """The URLs that workflows were submitted with: their starts and their ends."""

    name = ONCE
    kind = KIND
    schedule: Sequence[float] = SCHEDULE
    batch = 1
    parallel = 32

    def __init__(
        self,
        sender: Sender,
        clock: Clock,
        urls: Callable[[Collection[str]], Awaitable[dict[str, str]]],
        secret: Callable[[], Awaitable[Secret]],
        dress: Dress,
    ) -> None:
        self._sender = sender
        self._clock = clock
        self._urls = urls
        self._secret = secret
        self._dress = dress

    def wants(self, event: StoredFrame) -> bool:
        """Starts and ends; a lost attempt that is followed by another is no end."""
        if event.type not in ONCE_TYPES or event.workflow_id is None:
            return False
        return event.type != "workflow:error" or not _will_retry.decode(event.data).will_retry

    async def choose(self, events: Sequence[StoredFrame]) -> Sequence[StoredFrame]:
        """Those of workflows with a URL."""
        urls = await self._urls({event.workflow_id for event in events if event.workflow_id is not None})
        return [event for event in events if event.workflow_id in urls]

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """One call for each."""
        return [await self._deliver(one) for one in deliveries]

    async def _deliver(self, delivery: Delivery) -> Outcome:
        event = delivery.event
        try:
            url = (await self._urls([event.workflow_id or ""])).get(event.workflow_id or "")
            secret = await self._secret()
            (event,) = await self._dress((event,))
        except StoreUnavailable as error:
            return Again(str(error))
        if url is None:
            return Refused("The workflow was forgotten")
        body = body_of(event.type, event.data)
        outcome = await self._sender.send(url, signers(secret, self._clock.now_ms()), delivery.id, body)
        return patient(outcome, delivery.attempts)


def matches(patterns: Collection[str], kind: str) -> bool:
    """Whether one of the patterns names this type: a type, or its beginning and `*`."""
    return any(kind.startswith(pattern[:-1]) if pattern.endswith("*") else kind == pattern for pattern in patterns)
