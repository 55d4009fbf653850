"""ComfyUI over HTTP: one typed call for each endpoint we use (PROTOCOL §2). Files and /object_info by httpx, the
small questions of the queue by `channel`.

Must never retry: whether a call may be made twice is known to `backend`, not here (POST /prompt is not idempotent).
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from msgspec import Raw, Struct

from managers.comfyui import tolerant
from managers.comfyui.channel import Answer, Channel, NoAnswer, NotSent
from managers.comfyui.protocol import HistoryEntry, PromptAccepted, Queue, SystemStats, read_history
from managers.comfyui.spool import Spool
from managers.errors import BackendUnavailable, TooLarge

T = TypeVar("T")

_accepted = msgspec.json.Decoder(PromptAccepted, strict=False)
_queue = msgspec.json.Decoder(Queue, strict=False)
_histories = msgspec.json.Decoder(dict[str, Raw])
_system_stats = msgspec.json.Decoder(SystemStats, strict=False)
_anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()

_REFUSALS = {"error", "node_errors"}
_AWAY = {502, 503, 504}
"""What somebody between says of one that is not there."""
_TIMEOUT = httpx.Timeout(10.0, connect=5.0)
# ComfyUI validates the whole graph before it answers, and a server collecting its garbage stalls (PROTOCOL §9).
_POST_SECONDS = 30.0
_OBJECT_INFO_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_UPLOAD_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # it answers when all of it is on its disk


class Rejected(Struct, frozen=True):
    """ComfyUI refused a prompt; `body` is its JSON answer, or None when it was none."""

    status: int
    body: Any
    text: str


class Unanswered(Exception):
    """The request may or may not have arrived: only `locate` can tell (PROTOCOL §6)."""


class _Uploaded(Struct, frozen=True):
    """The answer to POST /upload/image; newer servers say more."""

    name: str
    subfolder: str = ""


_uploaded = msgspec.json.Decoder(_Uploaded, strict=False)


class UploadRefused(Exception):
    """ComfyUI does not take this file; the message is a sentence."""


class ComfyUIClient:
    """The HTTP side of one ComfyUI. Every call raises `BackendUnavailable` when no good answer came."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._channel = Channel(self.url)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=60),
            # No Origin is sent (PROTOCOL §2 "Origin check"), and a proxy of the environment has no business here.
            trust_env=False,
            verify=self.url.startswith("https:"),  # reading the certificates takes 50 ms
        )

    async def aclose(self) -> None:
        """Close the connections."""
        self._channel.close()
        await self._http.aclose()

    async def post_prompt(
        self, *, prompt_id: str, client_id: str, graph: bytes, extra_data: bytes | None
    ) -> PromptAccepted | Rejected:
        """Queue a prompt under our own id. Raises `Unanswered` when it may have arrived without our knowing,
        `BackendUnavailable` when it certainly has not.
        """
        body = msgspec.json.encode(
            {
                "prompt": Raw(graph),
                "client_id": client_id,
                "prompt_id": prompt_id,
                **({"extra_data": Raw(extra_data)} if extra_data else {}),
            }
        )
        try:
            reply = await self._channel.ask("POST", "/prompt", body, seconds=_POST_SECONDS)
        except NotSent as error:
            raise BackendUnavailable(f"ComfyUI does not answer: {error}") from error
        except NoAnswer as error:
            raise Unanswered(str(error)) from error
        if reply.status == 200:
            try:
                return tolerant.decode(reply.content, _accepted)
            except msgspec.DecodeError as error:
                raise Unanswered("the answer to POST /prompt was not understood") from error
        if reply.status >= 500:
            # A 500 may have queued the entry nevertheless (PROTOCOL §1.10).
            raise Unanswered(f"POST /prompt answered {reply.status}")
        try:
            parsed = tolerant.decode(reply.content, _anything)
        except msgspec.DecodeError:
            parsed = None
        if reply.status not in (400, 413) and not (isinstance(parsed, dict) and parsed.keys() & _REFUSALS):
            # Not ComfyUI's word about a graph, but that of something between us: a login, a limit, a wrong path.
            text = reply.content[:200].decode(errors="replace").strip()
            raise BackendUnavailable(f"POST /prompt is answered with {reply.status} {text}")
        return Rejected(reply.status, parsed, reply.content.decode(errors="replace")[:2000])

    async def queue(self) -> Queue:
        """What runs and what waits there, other people's prompts too."""
        return await self._get("/queue", _queue)

    async def history(self, prompt_id: str) -> HistoryEntry | None:
        """The ended prompt, or None (unknown, pending, running, deleted, evicted: all alike).

        One that cannot be understood says so (`unreadable`): to ask again would not help.
        """
        found = (await self._get(f"/history/{prompt_id}", _histories)).get(prompt_id)
        return None if found is None else read_history(found)

    async def delete_pending(self, *prompt_ids: str) -> None:
        """Take prompts out of the queue; running and unknown ids are ignored there."""
        await self._post("/queue", {"delete": list(prompt_ids)})

    async def interrupt(self, prompt_id: str) -> None:
        """Interrupt this prompt if it is the running one. Never without a body: that would hit whatever runs."""
        await self._post("/interrupt", {"prompt_id": prompt_id})

    async def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask for memory back; done by the worker after the running prompt."""
        await self._post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    async def system_stats(self) -> SystemStats:
        """Version and devices. An answer is no proof that the worker lives (PROTOCOL §1.9)."""
        return await self._get("/system_stats", _system_stats)

    async def reboot(self) -> None:
        """Ask ComfyUI-Manager to start ComfyUI again: its present route, then that of before version 4.

        It ends before it answers, which is no failure. Raises `BackendUnavailable` when it says no, or is not there.
        """
        for method, path in (("POST", "/v2/manager/reboot"), ("GET", "/manager/reboot")):
            try:
                status = (await self._channel.ask(method, path)).status
            except NotSent as error:
                raise BackendUnavailable(f"ComfyUI does not answer: {error}") from error
            except NoAnswer:
                return
            if status == 200:
                return
            if status not in (404, 405):
                raise BackendUnavailable(f"ComfyUI answered {status} to {method} {path}")
        raise BackendUnavailable("ComfyUI answered 404: it has no ComfyUI-Manager that could restart it")

    async def object_info(self, class_type: str | None = None) -> bytes:
        """The interfaces of all classes, or of one (`{}` when unknown), as JSON text."""
        path = "/object_info" if class_type is None else f"/object_info/{quote(class_type, safe='')}"
        try:
            reply = await self._http.get(path, timeout=_OBJECT_INFO_TIMEOUT)
        except httpx.HTTPError as error:
            raise BackendUnavailable(f"ComfyUI does not answer: {_reason(error)}") from error
        if reply.status_code == 404 and class_type is not None:
            return b"{}"  # a name that fits no route
        return _good(Answer(reply.status_code, reply.content), "GET", path)

    async def upload(self, spool: Spool, *, filename: str, subfolder: str, content_type: str) -> str:
        """Put a file into the input folder; the name under which loaders find it, which may be another than asked.

        `filename` and `subfolder` are made by us: letters, digits and `._-`. Raises `UploadRefused`, `TooLarge`.
        """
        boundary = secrets.token_hex(16)
        before = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="subfolder"\r\n\r\n{subfolder}\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="type"\r\n\r\ninput\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{filename}"\r\n'
            f"Content-Type: {content_type}\r\n\r\n"
        ).encode()
        after = f"\r\n--{boundary}--\r\n".encode()

        async def body() -> AsyncGenerator[bytes, None]:
            yield before
            async with aclosing(spool.read()) as pieces:
                async for piece in pieces:
                    yield piece
            yield after

        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(len(before) + spool.size + len(after)),
        }
        try:
            async with aclosing(body()) as content:
                reply = await self._http.post(
                    "/upload/image", content=content, headers=headers, timeout=_UPLOAD_TIMEOUT
                )
        except httpx.HTTPError as error:
            raise BackendUnavailable(f"ComfyUI does not answer: {_reason(error)}") from error
        if reply.status_code == 413:
            raise TooLarge(f"ComfyUI takes no file of {spool.size} bytes (see its --max-upload-size)")
        if reply.status_code in _AWAY:
            raise BackendUnavailable(f"ComfyUI answered {reply.status_code} to POST /upload/image")
        if reply.status_code != 200:  # its disk may be full: to ask for ever would hold up all others
            raise UploadRefused(f"ComfyUI answered {reply.status_code} to POST /upload/image")
        try:
            found = tolerant.decode(reply.content, _uploaded)
        except msgspec.DecodeError as error:
            raise UploadRefused("ComfyUI's answer to POST /upload/image was not understood") from error
        return f"{found.subfolder}/{found.name}" if found.subfolder else found.name

    @asynccontextmanager
    async def view(
        self,
        *,
        filename: str,
        subfolder: str,
        folder: str,
        headers: dict[str, str],
        head: bool = False,
        patience: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """A file through /view, streamed; Range and conditional headers are passed on. Any status is given back.

        `patience`: so many seconds may pass between two pieces of it; None: those of every other call.
        """
        request = self._http.build_request(
            "HEAD" if head else "GET",
            "/view",
            params={"filename": filename, "subfolder": subfolder, "type": folder},
            headers=headers,
            timeout=httpx.USE_CLIENT_DEFAULT if patience is None else patience,
        )
        try:
            reply = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise BackendUnavailable(f"ComfyUI does not answer: {_reason(error)}") from error
        try:
            yield reply
        finally:
            await reply.aclose()

    async def _get(self, path: str, decoder: msgspec.json.Decoder[T]) -> T:
        content = await self._ask("GET", path)
        try:
            return tolerant.decode(content, decoder)
        except msgspec.DecodeError as error:
            raise BackendUnavailable(f"ComfyUI's answer to GET {path.split('/')[1]} was not understood") from error

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        await self._ask("POST", path, msgspec.json.encode(body))

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            return _good(await self._channel.ask(method, path, body), method, path)
        except (NotSent, NoAnswer) as error:
            raise BackendUnavailable(f"ComfyUI does not answer: {error}") from error


def _good(answer: Answer, method: str, path: str) -> bytes:
    if answer.status != 200:
        raise BackendUnavailable(f"ComfyUI answered {answer.status} to {method} {path}")
    return answer.content


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
