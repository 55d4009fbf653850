"""The service as a client on the command line sees it: HTTP, and the stream. Nothing here prints.

Must never show or log the key, and never sends it anywhere but to the service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec
from msgspec import Struct
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from managers.events.types import Finding, NodeCounts, Output

WORKFLOWS = "/v1/comfyui/workflow"
_STREAM = "/v1/comfyui/stream"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PATIENCE_SECONDS = 60.0
"""How long the service may be away in the middle of a run (a restart) before we give up."""
_FINAL = frozenset({"completed", "failed", "cancelled"})
_ENDS = frozenset({"workflow:completed", "workflow:cancelled", "workflow:error"})


class Unreachable(Exception):
    """The service does not answer."""


class Refused(Exception):
    """The service said no; the message is its own, `findings` point at the places."""

    def __init__(self, status: int, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.findings = findings


class Workflow(Struct, frozen=True, kw_only=True, rename="camel"):
    """What we want to know of a workflow; the reply says more."""

    workflow_id: str
    status: str
    progress: int = 0
    current_node: str | None = None
    step: int | None = None
    steps: int | None = None
    message: str | None = None
    nodes: NodeCounts = NodeCounts()
    queue_position: int | None = None
    backend: str | None = None
    start_time: int | None = None
    completion_time: int | None = None
    outputs: tuple[Output, ...] = ()
    error: str | None = None
    errors: tuple[Finding, ...] = ()

    @property
    def final(self) -> bool:
        """It has ended, one way or another."""
        return self.status in _FINAL


class Frame(Struct, frozen=True, kw_only=True, rename="camel"):
    """One frame of the stream, with those fields of all its types that we look at."""

    type: str
    workflow_id: str | None = None
    snapshot: tuple[Workflow, ...] = ()
    progress: int = 0
    current_node: str | None = None
    step: int | None = None
    steps: int | None = None
    message: str | None = None
    nodes: NodeCounts = NodeCounts()
    queue_position: int | None = None
    backend: str | None = None
    attempt: int = 0
    error: str | None = None
    will_retry: bool = False

    @property
    def ends(self) -> bool:
        """Nothing more comes for this workflow."""
        return self.type in _ENDS and not self.will_retry


class _Problem(Struct, frozen=True):
    """An error reply (CONTRACT 2)."""

    detail: str = ""
    errors: tuple[Finding, ...] = ()


class Client:
    """One service, one key."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"X-API-Key": key} if key else {}
        self._local = urlsplit(self.url).hostname in _LOOPBACK
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(60.0, connect=5.0),
            trust_env=not self._local,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, body: Mapping[str, Any], *, strict: bool = False) -> Workflow:
        """Hand a workflow in. Raises `Refused`, `Unreachable`."""
        reply = await self._answer(
            "POST",
            WORKFLOWS,
            content=msgspec.json.encode(body),
            headers={"content-type": "application/json"} | ({"prefer": "handling=strict"} if strict else {}),
        )
        return _understood(reply)

    async def get(self, workflow_id: str) -> Workflow:
        """Look at a workflow. Raises `Refused`, `Unreachable`."""
        return _understood(await self._answer("GET", f"{WORKFLOWS}/{workflow_id}"))

    async def cancel(self, workflow_id: str) -> None:
        """Cancel it. Raises `Refused`, `Unreachable`."""
        await self._answer("DELETE", f"{WORKFLOWS}/{workflow_id}")

    @asynccontextmanager
    async def download(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of an output, as they come. `path` is one of this service. Raises `Refused`, `Unreachable`."""
        try:
            async with self._http.stream("GET", path) as reply:
                if reply.status_code != HTTPStatus.OK:
                    await reply.aread()
                    raise _refusal(reply)
                yield reply.aiter_bytes(2**16)
        except httpx.HTTPError as error:
            raise Unreachable(_words(error)) from error

    async def watch(self, workflow_id: str, show: Callable[[Workflow | Frame], None]) -> Workflow:
        """Follow it to its end: `show` hears first how it stands, then every event. Comes back after breaks.

        Raises `Refused`, and `Unreachable` when the service stays away.
        """
        loop = asyncio.get_running_loop()
        wait, gone_since = 0.2, loop.time()
        while True:
            try:
                async for seen in self._listen(workflow_id):
                    wait, gone_since = 0.2, loop.time()
                    show(seen)
                    if seen.final if isinstance(seen, Workflow) else seen.ends:
                        return await self.get(workflow_id)
            except InvalidStatus as error:
                if error.response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                    raise Refused(error.response.status_code, "The key is missing or wrong") from None
                seen = await self.get(workflow_id)  # something on the way lets no sockets through: look now and then
                show(seen)
                if seen.final:
                    return seen
            except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake, EOFError) as error:
                if loop.time() - gone_since > _PATIENCE_SECONDS:
                    raise Unreachable(_words(error)) from error
            await asyncio.sleep(wait)
            wait = min(wait * 2, 2.0)

    async def _listen(self, workflow_id: str) -> AsyncGenerator[Workflow | Frame, None]:
        async with self._socket() as socket:
            await socket.send(msgspec.json.encode({"type": "subscribe", "workflowId": workflow_id}).decode())
            subscribed = False
            async for raw in socket:
                if isinstance(raw, bytes):
                    continue
                frame = msgspec.json.decode(raw, type=Frame)
                if frame.type == "subscribed":
                    subscribed = True
                    if not frame.snapshot:
                        yield await self.get(workflow_id)
                    for workflow in frame.snapshot:
                        yield workflow
                elif subscribed and frame.workflow_id == workflow_id:  # what came before is in the snapshot
                    yield frame

    def _socket(self) -> connect:
        parts = urlsplit(self.url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        return connect(
            urlunsplit((scheme, parts.netloc, parts.path + _STREAM, "", "")),
            additional_headers=self._headers,
            compression=None,
            max_size=16 * 2**20,
            open_timeout=10,
            close_timeout=1,
            proxy=None if self._local else True,
        )

    async def _answer(self, method: str, path: str, **kwargs: Any) -> bytes:
        try:
            reply = await self._http.request(method, path, **kwargs)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(_words(error)) from error
        if reply.is_success:
            return reply.content
        raise _refusal(reply)


def _understood(body: bytes) -> Workflow:
    try:
        return msgspec.json.decode(body, type=Workflow)
    except msgspec.DecodeError:
        raise Unreachable("something else answers at this address") from None


def _refusal(reply: httpx.Response) -> Refused:
    phrase = f"{reply.status_code} {reply.reason_phrase}"
    try:
        problem = msgspec.json.decode(reply.content, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    return Refused(reply.status_code, f"{phrase}: {problem.detail}" if problem.detail else phrase, problem.errors)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
