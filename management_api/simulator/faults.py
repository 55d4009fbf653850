"""Faults that a test can ask for by `POST /_faults`; the route exists only with `--faults`.

Each fault is off unless set. Counters count down: `refuse_prompt: 2` breaks the next two submissions.
"""

import asyncio
import os
import sys
from typing import Any, NoReturn

import msgspec

from management_api.simulator.http import Send
from management_api.simulator.queue import PromptQueue
from management_api.simulator.sockets import Hub


class WorkerKilled(Exception):
    """Thrown into the worker by the fault `kill_worker`."""


class LostAnswer(Exception):
    """Breaks the connection instead of answering."""


class Plan(msgspec.Struct, forbid_unknown_fields=True):
    """What is to go wrong. Given values replace the ones before; `{}` puts all right again."""

    http_delay: float = 0.0
    """Seconds before any answer."""
    hang_prompt: float = 0.0
    """Seconds between the acceptance of a prompt and the answer."""
    refuse_prompt: int = 0
    """So many submissions break before they are accepted."""
    lose_prompt_response: int = 0
    """So many submissions are accepted, and the connection breaks instead of the answer."""
    die_after_accept: bool = False
    """The process ends (137) right after it has accepted a prompt."""
    kill_worker: bool = False
    """The worker dies when it takes the next prompt."""
    deaf: bool = False
    """Sockets stay open and hear nothing."""
    drop_sockets: bool = False
    """All sockets break now."""
    clear_history: bool = False
    """The history is emptied now."""
    exit: int | None = None
    """The process ends now with this status."""


class Faults:
    """The faults in force."""

    def __init__(self, hub: Hub, queue: PromptQueue) -> None:
        self._hub = hub
        self._queue = queue
        self._plan = Plan()

    def set(self, body: bytes) -> None:
        """Put a plan in force. msgspec.DecodeError or ValidationError for what is none."""
        self._plan = plan = msgspec.json.decode(body, type=Plan)
        self._hub.silent = plan.deaf
        if plan.exit is not None:
            _die(plan.exit)
        if plan.drop_sockets:
            for send in self._hub.peers():
                break_connection(send)
        if plan.clear_history:
            self._queue.forget_all()

    async def before_answer(self, path: str) -> None:
        """Delays every route but the one that sets faults."""
        if self._plan.http_delay and path != "/_faults":
            await asyncio.sleep(self._plan.http_delay)

    async def before_accept(self) -> None:
        """May break a submission that is not queued yet. LostAnswer."""
        if self._plan.refuse_prompt > 0:
            self._plan.refuse_prompt -= 1
            raise LostAnswer

    async def after_accept(self) -> None:
        """May break or delay the answer to a queued submission. LostAnswer."""
        if self._plan.die_after_accept:
            _die(137)
        if self._plan.hang_prompt:
            await asyncio.sleep(self._plan.hang_prompt)
        if self._plan.lose_prompt_response > 0:
            self._plan.lose_prompt_response -= 1
            raise LostAnswer

    async def before_execution(self) -> None:
        """May kill the worker. WorkerKilled."""
        if self._plan.kill_worker:
            raise WorkerKilled


def break_connection(send: Send) -> None:
    """Cut a connection without a last word. Leans on uvicorn's inside: ASGI has no word for this."""
    protocol: Any = getattr(send, "__self__", None)
    protocol.transport.abort()


def _die(status: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(status)
