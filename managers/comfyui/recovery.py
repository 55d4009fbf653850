"""Brings a stalled ComfyUI back: a probe prompt has to run to its end, and where it does not, ComfyUI is restarted.

Must never trust what only answers: a restarted ComfyUI has to run the probe as well. Must never restart twice for
one stall: what did not help once is for people to look at.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog

from managers.clock import IdMaker
from managers.comfyui.backend import Backend, Inbox, Place, Signal
from managers.comfyui.client import Rejected, Unanswered
from managers.comfyui.protocol import Executing, Message
from managers.comfyui.restart import RestartConfig, restart
from managers.errors import BackendUnavailable

log = structlog.get_logger(__name__)

_AGAIN_SECONDS = 1.0


def probe_graph(prompt_id: str) -> bytes:
    """Core nodes only, of a colour of its own so that no cache answers; the picture goes to `temp`."""
    colour = int(prompt_id.replace("-", "")[-6:], 16)
    empty = {"width": 16, "height": 16, "batch_size": 1, "color": colour}
    return msgspec.json.encode(
        {
            "1": {"class_type": "EmptyImage", "inputs": empty},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )


async def keep_trust(backend: Backend, config: RestartConfig, new_id: IdMaker) -> None:
    """Until cancelled: whenever the backend is stalled, bring it back."""
    while True:
        await backend.wait_stalled()
        await _Recovery(backend, config, new_id).run()
        backend.trust("A probe prompt has run to its end")


class _Recovery:
    """One stall."""

    def __init__(self, backend: Backend, config: RestartConfig, new_id: IdMaker) -> None:
        self._backend = backend
        self._config = config
        self._new_id = new_id
        self._patience = backend.watchdog.config.interrupt
        self._look_after = self._patience / 4
        self._restart_at = backend.clock.monotonic() + self._patience if config.argv else None
        self._connection = backend.connections

    async def run(self) -> None:
        """Until a probe has run."""
        while True:
            prompt_id = self._new_id()
            with self._backend.inbox(prompt_id) as inbox:
                place = await self._post(prompt_id)
                if place is Place.ABSENT:
                    await self._news(inbox, self._look_after if self._backend.up else None)
                while place in (Place.PENDING, Place.RUNNING):
                    await self._news(inbox, self._look_after)
                    place = await self._locate(prompt_id, place)
                if place is Place.ENDED:
                    return

    async def _post(self, prompt_id: str) -> Place:
        backend = self._backend
        if not backend.up:
            return Place.ABSENT
        try:
            answer = await backend.client.post_prompt(
                prompt_id=prompt_id, client_id=backend.client_id, graph=probe_graph(prompt_id), extra_data=None
            )
        except Unanswered:
            return Place.PENDING  # perhaps: it is looked for, and another follows where it is not
        except BackendUnavailable:
            await asyncio.sleep(_AGAIN_SECONDS)
            return Place.ABSENT
        if isinstance(answer, Rejected):
            log.warning("ComfyUI refuses the probe prompt", backend=backend.name, reason=answer.text)
            # It cannot be asked. A fresh process is believed then.
            return Place.ABSENT if backend.connections == self._connection else Place.ENDED
        return Place.PENDING

    async def _locate(self, prompt_id: str, before: Place) -> Place:
        try:
            return (await self._backend.locate(prompt_id)).place
        except BackendUnavailable:
            return before

    async def _news(self, inbox: Inbox, seconds: float | None) -> None:
        """Until the probe has ended, ComfyUI is back, or it is time to look; the last step when it is due."""
        left = None if self._restart_at is None else max(0.0, self._restart_at - self._backend.clock.monotonic())
        try:
            async with asyncio.timeout(min((wait for wait in (seconds, left) if wait is not None), default=None)):
                while not _is_news(await inbox.get()):
                    pass
        except TimeoutError:
            if left is not None and (seconds is None or left <= seconds):
                await self._restart()

    async def _restart(self) -> None:
        """The last step, once; later where something of ours moves all the same."""
        backend = self._backend
        if backend.watchdog.moves(backend.clock.monotonic()):
            self._restart_at = backend.clock.monotonic() + self._patience
            return
        self._restart_at = None
        log.warning("restarting a stalled ComfyUI", backend=backend.name)
        await restart(self._config, backend.client)


def _is_news(item: object) -> bool:
    if isinstance(item, Message):
        return isinstance(item.body, Executing) and item.body.node is None
    return item is Signal.UP
