"""The one WebSocket to a ComfyUI: connects, greets, listens, and comes back with a back-off.

Must never open a second socket while the first is not closed: the server would unregister the new one when it reaps
the old, and it would be deaf (PROTOCOL §1.7). What is missed while away is lost; `backend` asks by HTTP.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from urllib.parse import quote, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from managers.comfyui.protocol import FIRST_FRAME, Message, PreviewFrame, TextFrame, decode_binary, decode_text

Frame = Message | PreviewFrame | TextFrame

_MAX_FRAME = 256 * 2**20  # full-size PNG frames of SaveImageWebsocket, and errors that print tensors
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 10.0


class ComfyUISocket:
    """Calls back, on the loop and in order, for every frame and every change of the connection."""

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        on_frame: Callable[[Frame], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
    ) -> None:
        parts = urlsplit(url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        path = parts.path.rstrip("/") + "/ws"
        self._url = urlunsplit((scheme, parts.netloc, path, f"clientId={quote(client_id)}", ""))
        self._on_frame, self._on_up, self._on_down = on_frame, on_up, on_down
        self._connection: ClientConnection | None = None
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        wait = _FIRST_WAIT_SECONDS
        while True:
            reason = "closed"
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
                    wait = _FIRST_WAIT_SECONDS
                    self._on_up()
                    try:
                        await self._listen(self._connection)
                    except ConnectionClosed as error:
                        reason = _words(error)
                    self._on_down(reason)
            except (OSError, InvalidHandshake, InvalidURI, TimeoutError, EOFError, ConnectionClosed) as error:
                reason = _words(error)
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

    async def _listen(self, connection: ClientConnection) -> None:
        async for raw in connection:
            frame = decode_text(raw) if isinstance(raw, str) else decode_binary(raw)
            if frame is not None:
                self._on_frame(frame)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
