"""Fan-out in this process: an event goes in once and reaches everybody who listens, in order.

Must never block, wait, or do I/O of its own, and must never be told what is not committed: `publish_stored` comes
after the commit. Who is slow is no business of the hub: each subscriber copes with its own peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from managers.events.log import EventLog, StoredFrame
from managers.events.packets import Packet, live, stored
from managers.events.types import ComfyUIMessage, LiveEvent, StoredEvent

Listener = Callable[[LiveEvent | StoredEvent], None]

_PROGRESS_STATE = "comfyui:progress_state"
_ENDS = {"comfyui:execution_success", "comfyui:execution_error", "comfyui:execution_interrupted"}
_THROTTLE_SECONDS = 0.25


class Subscriber(Protocol):
    """Somebody at the end of a wire."""

    def offer(self, packet: Packet) -> None:
        """Take it, queue it, or leave it; at once."""
        ...

    def close(self, code: int, reason: str) -> None:
        """The service ends: say goodbye and `unsubscribe`. `code` is a WebSocket close code."""
        ...


class Hub:
    """`clients` and `dropped` are for metrics; `seq` is that of the last stored event everybody was offered."""

    def __init__(self, log: EventLog) -> None:
        self.dropped = 0
        self.closing = False
        self._log = log
        self._seq: int | None = None
        self._subscribers: tuple[Subscriber, ...] = ()
        self._listeners: tuple[Listener, ...] = ()
        self._throttle = _Throttle(self._offer)
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def clients(self) -> int:
        """How many listen from outside."""
        return len(self._subscribers)

    @property
    def seq(self) -> int:
        """The `seq` of the last stored event that was published; before the first one, the log's."""
        return self._log.last_seq if self._seq is None else self._seq

    def publish(self, event: LiveEvent) -> None:
        """Tell everybody what is not stored. On the loop; never blocks."""
        if self._subscribers:
            if isinstance(event, ComfyUIMessage):
                self._throttle.pass_on(event)
            else:
                self._offer(event)
        self._tell(event)

    def publish_stored(self, pairs: Sequence[tuple[StoredEvent, StoredFrame]]) -> None:
        """Tell everybody what was committed, in the order of `seq`. On the loop; never blocks."""
        for event, frame in pairs:
            self._seq = frame.seq
            packet = stored(frame)
            for subscriber in self._subscribers:
                subscriber.offer(packet)
            self._tell(event)

    def subscribe(self, subscriber: Subscriber) -> None:
        """From now on it is offered everything."""
        self._subscribers = (*self._subscribers, subscriber)
        self._empty.clear()

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """No more; unknown ones are ignored."""
        self._subscribers = tuple(one for one in self._subscribers if one is not subscriber)
        if not self._subscribers:
            self._empty.set()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call this for every event, unthrottled: for use inside the house. It must be quick and raise nothing.

        What is returned ends it.
        """
        self._listeners = (*self._listeners, listener)

        def stop() -> None:
            self._listeners = tuple(one for one in self._listeners if one is not listener)

        return stop

    def count_dropped(self) -> None:
        """A subscriber left something out: merged with a later one, or dropped."""
        self.dropped += 1

    async def close(self, seconds: float = 2.0) -> None:
        """Close everybody (1001) and wait up to so many seconds until they are gone; take nobody new."""
        self.closing = True
        self._throttle.close()
        for subscriber in self._subscribers:
            subscriber.close(1001, "The service is going away")
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            pass  # a peer that does not answer the goodbye must not hold up the shutdown

    def _offer(self, event: LiveEvent) -> None:
        packet = live(event)
        for subscriber in self._subscribers:
            subscriber.offer(packet)

    def _tell(self, event: LiveEvent | StoredEvent) -> None:
        for listener in self._listeners:
            listener(event)


class _Throttle:
    """ComfyUI's `progress_state` repeats all nodes each time (PROTOCOL §3): one in 250 ms for each workflow.

    The last one always arrives, and before the message that ends its run.
    """

    def __init__(self, offer: Callable[[LiveEvent], None]) -> None:
        self._offer = offer
        self._waiting: dict[tuple[str, object], ComfyUIMessage | None] = {}
        self._timers: dict[tuple[str, object], asyncio.TimerHandle] = {}

    def pass_on(self, message: ComfyUIMessage) -> None:
        """Now, or when its time has come and no newer one took its place."""
        key = (message.backend, message.workflow_id)
        if message.type != _PROGRESS_STATE:
            if message.type in _ENDS:
                self._flush(key)
            self._offer(message)
        elif key in self._timers:
            self._waiting[key] = message
        else:
            self._offer(message)
            self._arm(key)

    def close(self) -> None:
        """Forget what waits."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._waiting.clear()

    def _arm(self, key: tuple[str, object]) -> None:
        self._timers[key] = asyncio.get_running_loop().call_later(_THROTTLE_SECONDS, self._due, key)

    def _due(self, key: tuple[str, object]) -> None:
        del self._timers[key]
        message = self._waiting.pop(key, None)
        if message is not None:
            self._offer(message)
            self._arm(key)

    def _flush(self, key: tuple[str, object]) -> None:
        message = self._waiting.pop(key, None)
        if message is not None:
            self._offer(message)
