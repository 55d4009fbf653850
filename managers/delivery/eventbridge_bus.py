"""The event bus: entries in, for each of them what became of it.

The client is built at the first put and never before: nobody who has no bus pays for it, nor needs the extra `aws`.
Must never try again: whose patience that is, is known above.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from msgspec import Struct

from managers.delivery.eventbridge_details import SOURCE, Entry, calls
from managers.delivery.port import Again, Delivered, Outcome, Refused
from managers.errors import ManagerError

_CONNECT_SECONDS, _READ_SECONDS, _CALL_SECONDS = 5, 10, 15.0
_LONGEST = 200
_HOPELESS = frozenset({"MalformedDetail", "InvalidArgument", "InvalidEventPattern"})
"""What EventBridge says of an entry that it would never take."""
_CULPRIT = frozenset({"ValidationException", "PutEventsRequestEntrySizeExceeded"})


class BusConfig(Struct, frozen=True, kw_only=True):
    """Where the bus is. What is None is looked for by the usual AWS chain (environment, profile, role)."""

    name: str
    region: str | None = None
    endpoint_url: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None


class MissingExtra(ManagerError):
    """The library for AWS is not installed."""


class Bus:
    """One bus. Raises `MissingExtra` when it cannot work at all."""

    def __init__(self, config: BusConfig) -> None:
        if find_spec("aiobotocore") is None:
            raise MissingExtra("EVENTBRIDGE_BUS_NAME needs aiobotocore: pip install 'comfyui-management-api[aws]'")
        self._config = config
        self._building = asyncio.Lock()
        self._client: Any = None
        self._errors: Any = None

    async def put(self, entries: Sequence[Entry]) -> list[Outcome]:
        """One outcome for each, in order. Raises nothing but `CancelledError`."""
        outcomes: list[Outcome] = []
        for some in calls(entries):
            told = await self._try(some)
            if isinstance(told, list):
                outcomes += told
            elif isinstance(told, _Culprit):
                outcomes += [outcome for one in some for outcome in await self.put([one])]
            else:  # the rest would fare no better
                return outcomes + [told] * (len(entries) - len(outcomes))
        return outcomes

    async def aclose(self) -> None:
        """Close its connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.__aexit__(None, None, None)

    async def _try(self, entries: Sequence[Entry]) -> list[Outcome] | Outcome | _Culprit:
        """One for each, or one for all."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return await self._put(entries)
        except TimeoutError:
            return Again(f"EventBridge has not answered within {_CALL_SECONDS:g} s")
        except Exception as error:  # noqa: BLE001 -- whatever the library has to say: it is no fault of the entries
            return _failed(error, alone=len(entries) == 1)

    async def _put(self, entries: Sequence[Entry]) -> list[Outcome]:
        client = await self._built()
        reply = await client.put_events(
            Entries=[
                {
                    "Source": SOURCE,
                    "DetailType": entry.detail_type,
                    "Detail": entry.detail,
                    "EventBusName": self._config.name,
                    "Time": datetime.fromtimestamp(entry.time / 1000, UTC),
                }
                for entry in entries
            ]
        )
        return [_outcome(told) for told in reply["Entries"]]

    async def _built(self) -> Any:
        async with self._building:
            if self._client is None:
                # About a second of importing and reading of files, which the loop has no time for.
                session, config = await asyncio.to_thread(_prepare)
                own = self._config
                self._client = await session.create_client(
                    "events",
                    region_name=own.region,
                    endpoint_url=own.endpoint_url,
                    aws_access_key_id=own.access_key_id,
                    aws_secret_access_key=own.secret_access_key,
                    aws_session_token=own.session_token,
                    config=config,
                ).__aenter__()
        return self._client


def _prepare() -> tuple[Any, Any]:
    session = import_module("aiobotocore.session").get_session()
    session.get_component("data_loader").load_service_model("events", "service-2")
    config = import_module("aiobotocore.config").AioConfig(
        connect_timeout=_CONNECT_SECONDS, read_timeout=_READ_SECONDS, retries={"total_max_attempts": 1}
    )
    return session, config


def _outcome(told: Mapping[str, Any]) -> Outcome:
    code = told.get("ErrorCode")
    if not code:
        return Delivered()
    words = f"{code}: {told.get('ErrorMessage') or 'EventBridge gives no reason'}"
    return Refused(words) if code in _HOPELESS else Again(words)


class _Culprit:
    """The call was refused for what is in it: the others must not suffer for that one."""


def _failed(error: Exception, *, alone: bool) -> Outcome | _Culprit:
    """No entry of the call has arrived. One that is refused alone is refused for good."""
    answer = getattr(error, "response", None)  # botocore's ClientError: EventBridge, or a proxy, has answered
    if not isinstance(answer, dict):
        return Again(f"EventBridge cannot be reached: {error or type(error).__name__}")
    code = answer.get("Error", {}).get("Code", "")
    told = " ".join(str(answer.get("Error", {}).get("Message", "")).split())[:_LONGEST]  # a proxy may send a page
    words = f"EventBridge answers {code}: {told}"
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code in _CULPRIT:
        return Refused(words, status) if alone else _Culprit()
    return Again(words, status=status)
