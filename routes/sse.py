"""Server-sent events, reusable: ids to resume from, and a comment as heartbeat (CONTRACT 4, 7).

Must never hold events back: each goes out at once, and a reader that has gone ends the iterator behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from litestar.response import Stream
from msgspec import Struct

from managers.callers import always
from managers.events.log import StoredFrame

_HEARTBEAT = b": heartbeat\n\n"


class SseEvent(Struct, frozen=True, kw_only=True):
    """One event: `data` is its text, `id` is where a client resumes, `event` a name that needs its own listener."""

    data: bytes
    id: int | None = None
    event: str | None = None

    def encode(self) -> bytes:
        """As it goes over the wire."""
        lines = [b"event: " + self.event.encode()] if self.event is not None else []
        if self.id is not None:
            lines.append(b"id: %d" % self.id)
        lines += [b"data: " + line for line in self.data.splitlines() or [b""]]
        return b"\n".join(lines) + b"\n\n"


def event_stream(
    frames: AsyncGenerator[StoredFrame, None], *, heartbeat_seconds: float = 30, welcome: Callable[[], bool] = always
) -> Stream:
    """The reply that sends stored events as they come; `id:` is the seq. Closes the generator, whoever ends it.

    `welcome` is asked before each event and heartbeat; False ends it.
    """
    return sse(_of_frames(frames), heartbeat_seconds=heartbeat_seconds, welcome=welcome)


def sse(
    events: AsyncGenerator[SseEvent, None], *, heartbeat_seconds: float = 30, welcome: Callable[[], bool] = always
) -> Stream:
    """The same for events of any kind."""
    return Stream(
        _lines(events, heartbeat_seconds, welcome),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _of_frames(frames: AsyncGenerator[StoredFrame, None]) -> AsyncGenerator[SseEvent, None]:
    try:
        async for frame in frames:
            yield SseEvent(data=frame.data, id=frame.seq)
    finally:
        await frames.aclose()


async def _lines(
    events: AsyncGenerator[SseEvent, None], heartbeat_seconds: float, welcome: Callable[[], bool]
) -> AsyncGenerator[bytes, None]:
    yield b": stream\n\n"  # the headers go out with the first bytes: a client sees at once that it is connected
    coming: asyncio.Task[SseEvent] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=heartbeat_seconds)
            if not welcome():
                return
            if not done:
                yield _HEARTBEAT
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield event.encode()
    finally:
        if coming is not None and coming.cancel():
            await asyncio.wait({coming})
        await events.aclose()
