"""One socket's conversation (CONTRACT 6): what it asks, what it is answered, what it is told and what it missed.

Must never know which server carries it: a `Writer` takes packets, `receive` gives the client's frames. One discipline
keeps the order: everything a client reads, replies too, passes `_push`; nothing is written beside it.

While an answer needs the disk (a snapshot, a replay), stored events are not kept here but read from the log
afterwards, from `_cursor` on, and live ones wait in `_held`. A peer too slow for its lifecycle events ends up in the
same state: its queue is emptied, and filled from the log when it reads again. So memory is bounded and nothing is
lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from msgspec import Struct

from managers.callers import always
from managers.clock import Clock
from managers.errors import Unavailable
from managers.events.hub import Hub
from managers.events.log import EventLog
from managers.events.outbox import Outbox
from managers.events.packets import Packet, reply, stored
from managers.events.subscriptions import BadFrame, Ping, Subscribe, Subscription, Unsubscribe, parse
from managers.events.types import Channel

_POLICY, _TRY_AGAIN = 1008, 1013


class StreamConfig(Struct, frozen=True, kw_only=True):
    """Seconds, bytes and counts of one socket. `max_waiting` stored events wait here before the log has to serve."""

    heartbeat_seconds: float = 30
    stall_seconds: float = 30
    close_seconds: float = 5
    read_seconds: float = 30
    max_bad_frames: int = 20
    max_frame_bytes: int = 65536
    max_waiting: int = 512
    max_live: int = 256
    page: int = 256


class SnapshotSource(Protocol):
    """Workflows as clients see them, and the `seq` they are up to, from one read."""

    async def snapshot(self, workflow_ids: Collection[str] | None, /) -> tuple[int, Sequence[Struct]]:
        """The named ones, or with None the running ones."""
        ...


class Writer(Protocol):
    """The way to one peer."""

    @property
    def ready(self) -> bool:
        """The peer reads fast enough and the connection is open."""
        ...

    def write(self, packet: Packet) -> bool:
        """Send it after what was written before, at once; False when not `ready`."""
        ...

    def attach(self, on_ready: Callable[[], None], on_end: Callable[[int, str], None]) -> None:
        """`on_ready` is called when `ready` has become true, `on_end` when nothing can be written any more."""
        ...


class End(Struct, frozen=True):
    """How a conversation ended; `code` is what to close with, 0 when the client has gone."""

    code: int
    reason: str


class Answer(Struct, frozen=True, kw_only=True, rename="camel", tag_field="type"):
    """The root of what only one client gets."""


class Pong(Answer, frozen=True, kw_only=True, tag="pong"):
    """The answer to a ping. Epoch ms."""

    timestamp: int


class Heartbeat(Answer, frozen=True, kw_only=True, tag="heartbeat"):
    """We live; `seq` is the last stored event that was told, so a good `since`."""

    timestamp: int
    seq: int


class Subscribed(Answer, frozen=True, kw_only=True, tag="subscribed"):
    """What the socket hears from now on (`workflowIds` null: all), and how things are as of `seq`."""

    workflow_ids: tuple[str, ...] | None
    channels: tuple[Channel, ...]
    seq: int
    snapshot: Sequence[Struct]


class Unsubscribed(Answer, frozen=True, kw_only=True, tag="unsubscribed"):
    """What the socket still hears."""

    workflow_ids: tuple[str, ...] | None
    channels: tuple[Channel, ...]
    seq: int


class Refused(Answer, frozen=True, kw_only=True, tag="error"):
    """The answer to a bad frame."""

    code: str
    message: str


class Gap(Answer, frozen=True, kw_only=True, tag="gap", rename={"from_": "from"}):
    """These events were missed and are no longer kept."""

    from_: int
    to: int


class StreamSession:
    """`run` it once; it subscribes to the hub by itself. `welcome` is asked with each heartbeat; False ends it."""

    def __init__(
        self,
        *,
        hub: Hub,
        log: EventLog,
        source: SnapshotSource,
        clock: Clock,
        config: StreamConfig,
        writer: Writer,
        since: int | None = None,
        welcome: Callable[[], bool] = always,
    ) -> None:
        self._hub = hub
        self._log = log
        self._source = source
        self._clock = clock
        self._config = config
        self._writer = writer
        self._since = since
        self._welcome = welcome
        self._subscription = Subscription()
        self._outbox = Outbox(config.max_live, hub.count_dropped)
        self._held: Outbox | None = None
        self._cursor = 0  # while `_held`: what was sent; after it: what the hub may still offer a second time
        self._turn = asyncio.Lock()
        self._drained = asyncio.Event()
        self._bad_frames = 0
        self._blocked_at: float | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._catching_up: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()

    async def run(
        self,
        receive: Callable[[], Awaitable[str | bytes | None]],
        say_goodbye: Callable[[End], Awaitable[None]],
    ) -> None:
        """Until either side has had enough, and the goodbye is said: only then has the hub one client less.

        `receive` gives the client's next frame, None when it has gone.
        """
        self._writer.attach(self._flush, self.close)
        if self._since is not None:
            self._hold()
        self._hub.subscribe(self)
        self._arm("heartbeat", self._config.heartbeat_seconds, self._beat)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                conversation = tasks.create_task(self._converse(receive))
                end = await self._ended
                conversation.cancel()
                if self._catching_up is not None:
                    self._catching_up.cancel()
            self._subscription = Subscription(ids=frozenset())
            await say_goodbye(end)
        finally:
            self._hub.unsubscribe(self)
            for timer in self._timers.values():
                timer.cancel()

    def close(self, code: int, reason: str) -> None:
        """End it; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(End(code, reason))

    # ---- from the hub to the peer

    def offer(self, packet: Packet) -> None:
        """What the hub tells everybody."""
        if self._held is not None:
            if packet.ends:
                # What was live about it is stale, and must not be told after its end.
                self._held.discard(lambda waiting: waiting.workflow_id == packet.workflow_id)
            if not packet.seq and self._subscription.wants(packet.channel, packet.workflow_id):
                self._held.put(packet)
        elif self._subscription.wants(packet.channel, packet.workflow_id):
            if not packet.seq:
                self._push(self._in_its_form(packet) if packet.binary else packet)
            elif packet.seq > self._cursor:
                self._push(packet)
                if self._outbox.must > self._config.max_waiting:
                    self._fall_behind()

    def _in_its_form(self, packet: Packet) -> Packet:
        return packet.as_json() if self._subscription.preview_format == "json" else packet

    def _push(self, packet: Packet) -> None:
        if packet.has_old_name and self._subscription.names == "old":
            packet = packet.as_old()
        if not self._outbox.waiting and self._writer.write(packet):
            return
        self._drained.clear()
        self._outbox.put(packet)
        if packet.must and self._blocked_at is None:
            self._blocked_at = self._clock.monotonic()
            self._arm("stall", self._config.stall_seconds, self._check_stall)

    def _flush(self) -> None:
        moved = False
        while self._outbox.waiting and self._writer.ready:
            packet = self._outbox.pop()
            self._writer.write(packet)
            moved = moved or packet.must
        if not self._outbox.waiting and self._writer.ready:
            self._blocked_at = None
            self._drained.set()
        elif moved and self._blocked_at is not None:
            self._blocked_at = self._clock.monotonic()

    async def _wait_until_drained(self) -> None:
        """Bounded by the stall timer where events wait, by the server's own pings where none do."""
        while self._outbox.waiting or not self._writer.ready:
            self._drained.clear()
            await self._drained.wait()

    def _check_stall(self) -> None:
        if self._blocked_at is None:
            return
        left = self._blocked_at + self._config.stall_seconds - self._clock.monotonic()
        if left > 0:
            self._arm("stall", left, self._check_stall)
        else:
            self.close(_TRY_AGAIN, "Too slow: connect again and ask for what was missed with since")

    def _beat(self) -> None:
        if not self._welcome():
            self.close(_POLICY, "The key is no longer good for this")
            return
        self._arm("heartbeat", self._config.heartbeat_seconds, self._beat)
        if self._held is None:  # else the number would overtake events that are still to be read from the log
            self._push(reply(Heartbeat(timestamp=self._clock.now_ms(), seq=self._hub.seq), key="heartbeat"))

    def _arm(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, callback)

    # ---- when the log has to serve

    def _hold(self) -> None:
        """From now on the log gives what is stored. Everything up to the hub's `seq` has been offered."""
        if self._held is None:
            self._held = Outbox(self._config.max_live, self._hub.count_dropped)
            self._cursor = self._hub.seq

    def _fall_behind(self) -> None:
        self._hold()
        self._cursor = self._outbox.give_up() - 1
        self._catching_up = self._tasks.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        async with self._turn:
            try:
                await self._replay_and_release()
            except (Unavailable, TimeoutError):
                self.close(_TRY_AGAIN, "The event log cannot be read")

    async def _replay_and_release(self) -> None:
        await self._replay(self._subscription, None)
        held, self._held = self._held, None
        for packet in held or ():
            if self._subscription.wants(packet.channel, packet.workflow_id):
                self._push(self._in_its_form(packet))

    async def _replay(self, subscription: Subscription, upto: int | None) -> None:
        """Send what is stored beyond the cursor: up to `upto`, or with None until the hub has no more to give."""
        while self._cursor < (target := self._hub.seq if upto is None else upto):
            await self._wait_until_drained()
            async with asyncio.timeout(self._config.read_seconds):
                frames = await self._log.events_after(self._cursor, self._config.page)
            for frame in frames:
                if upto is not None and frame.seq > upto:
                    break
                self._cursor = frame.seq
                packet = stored(frame)
                if subscription.wants(packet.channel, packet.workflow_id):
                    self._push(packet)
            else:
                if len(frames) == self._config.page:
                    continue
            self._cursor = max(self._cursor, target)  # numbers that no event has, at the end

    async def _rewind(self, since: int) -> None:
        """Go back to what the client has seen, or to the oldest that is kept, with a word about the gap."""
        async with asyncio.timeout(self._config.read_seconds):
            first = await self._log.first_seq()
        if since + 1 < first:
            self._push(reply(Gap(from_=since + 1, to=first - 1)))
        self._cursor = min(max(since, first - 1), self._hub.seq)

    # ---- from the peer

    async def _converse(self, receive: Callable[[], Awaitable[str | bytes | None]]) -> None:
        try:
            if self._since is not None:
                async with self._turn:
                    await self._rewind(self._since)
                    await self._replay_and_release()
            while (data := await receive()) is not None:
                await self._wait_until_drained()  # who does not read its answers is not asked for more questions
                await self._hear(data)
        except (Unavailable, TimeoutError):
            self.close(_TRY_AGAIN, "The event log cannot be read")
        self.close(0, "")

    async def _hear(self, data: str | bytes) -> None:
        try:
            match parse(data, self._config.max_frame_bytes):
                case Ping():
                    self._push(reply(Pong(timestamp=self._clock.now_ms())))
                case Subscribe() as frame:
                    await self._subscribe(frame)
                case Unsubscribe() as frame:
                    await self._unsubscribe(frame)
        except BadFrame as error:
            self._bad_frames += 1
            self._push(reply(Refused(code=error.code, message=str(error))))
            if self._bad_frames >= self._config.max_bad_frames:
                self.close(_POLICY, "Too many bad frames")

    async def _subscribe(self, frame: Subscribe) -> None:
        before, after = self._subscription, self._subscription.add(frame)
        async with self._turn:
            self._hold()
            if frame.since is not None:
                before = self._subscription = after
                await self._rewind(frame.since)
                await self._replay(after, None)
            ids = frame.ids or after.ids
            async with asyncio.timeout(self._config.read_seconds):
                seq, snapshot = await self._source.snapshot(ids)
            if self._held is not None:  # progress from before the snapshot would go back behind it
                self._held.discard(
                    lambda old: old.channel == "workflow" and (ids is None or old.workflow_id in ids),
                )
            await self._replay(before, seq)
            self._subscription = after
            names, channels = _shown(after)
            self._push(reply(Subscribed(workflow_ids=names, channels=channels, seq=seq, snapshot=snapshot)))
            await self._replay_and_release()

    async def _unsubscribe(self, frame: Unsubscribe) -> None:
        async with self._turn:
            self._subscription = self._subscription.remove(frame)
            names, channels = _shown(self._subscription)
            self._push(reply(Unsubscribed(workflow_ids=names, channels=channels, seq=self._hub.seq)))


def _shown(subscription: Subscription) -> tuple[tuple[str, ...] | None, tuple[Channel, ...]]:
    ids = subscription.ids
    return None if ids is None else tuple(sorted(ids)), tuple(sorted(subscription.channels))
