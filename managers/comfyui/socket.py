"""The one WebSocket to a ComfyUI: connects, greets, listens, and comes back with a back-off.

Must never open a second socket while the first is not closed: the server would unregister the new one when it reaps
the old, and it would be deaf (PROTOCOL §1.7). What is missed while away is lost; `backend` asks by HTTP.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable
from urllib.parse import quote, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus, InvalidURI, WebSocketException

from managers.comfyui.protocol import FIRST_FRAME, Message, PreviewFrame, TextFrame, decode_binary, decode_text

Frame = Message | PreviewFrame | TextFrame

_MAX_FRAME = 256 * 2**20  # full-size PNG frames of SaveImageWebsocket, and errors that print tensors
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 10.0


class ComfyUISocket:
    """Calls back, on the loop and in order, for every frame and every change of the connection.

    `on_down` and `on_failed` (an attempt to connect came to nothing) are told why, in words without an address.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        on_frame: Callable[[Frame], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        parts = urlsplit(url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        path = parts.path.rstrip("/") + "/ws"
        self._url = urlunsplit((scheme, parts.netloc, path, f"clientId={quote(client_id)}", ""))
        self._on_frame, self._on_up, self._on_down, self._on_failed = on_frame, on_up, on_down, on_failed
        self._connection: ClientConnection | None = None
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        wait = _FIRST_WAIT_SECONDS
        while True:
            try:
                async with connect(
                    self._url,
                    max_size=_MAX_FRAME,
                    compression=None,
                    open_timeout=10,
                    ping_interval=20,
                    ping_timeout=20,
                    close_timeout=2,
                    proxy=None,
                    origin=None,
                ) as self._connection:
                    await self._connection.send(FIRST_FRAME)
                    self._on_up()
                    reason, heard = await self._listen(self._connection)
                    wait = _FIRST_WAIT_SECONDS if heard else wait  # a proxy may accept and know nobody
                    self._on_down(reason)
            except (OSError, WebSocketException, TimeoutError, EOFError) as error:
                self._on_failed(_words(error))
            finally:
                self._connection = None
            try:
                async with asyncio.timeout(wait * random.uniform(0.75, 1.25)):  # noqa: S311  # jitter, not a secret
                    await self._hurry.wait()
            except TimeoutError:
                wait = min(wait * 2, _LONGEST_WAIT_SECONDS)
            self._hurry.clear()

    async def reconnect(self) -> None:
        """Close what seems deaf; `run` opens the next one when the close has ended."""
        if self._connection is not None:
            await self._connection.close()
        self._hurry.set()

    async def _listen(self, connection: ClientConnection) -> tuple[str, bool]:
        """Until its end; gives the reason, and whether there was a word before."""
        heard = False
        try:
            async for raw in connection:
                heard = True
                frame = decode_text(raw) if isinstance(raw, str) else decode_binary(raw)
                if frame is not None:
                    self._on_frame(frame)
        except ConnectionClosed as error:
            return _words(error), heard
        return "closed", heard


_REFUSED = {
    401: "it, or a proxy before it, wants a name and a password",
    403: "it takes us for a foreign web page, or a proxy forbids it. Does something on the way add an Origin header?",
    404: "there is no ComfyUI at this address",
}


def _words(error: BaseException) -> str:
    """What an operator can do something about; never with the address, which may hold a password."""
    match error:
        case InvalidStatus():
            status = error.response.status_code
            if status in (502, 503, 504):
                return f"The proxy before it does not reach it ({status})"
            return f"The WebSocket was refused with {status}: {_REFUSED.get(status, 'is it a ComfyUI?')}"
        case InvalidMessage() | EOFError():
            return "What listens there does not speak HTTP. Should the URL begin with https?"
        case InvalidURI():
            return f"The address is not valid: {error.msg}"
        case ConnectionClosed(rcvd=None, sent=None):
            return "The connection broke off: it has ended, or the network has"
        case ConnectionClosed(rcvd=None):
            return "It no longer answers: the connection was given up"
        case ssl.SSLCertVerificationError():
            return f"Its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            return f"No TLS connection ({error.reason}). Should the URL begin with http?"
        case socket.gaierror():
            return "Its host name is not known"
        case ConnectionRefusedError():
            return "Nothing listens at its address: is it started?"
        case TimeoutError():
            return "It did not answer in time"
        case OSError():
            return error.strerror or str(error)
        case _:
            return str(error) or type(error).__name__
