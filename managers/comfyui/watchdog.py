"""What one ComfyUI has shown of life, and when it is not to be trusted. Decisions only.

Must never do I/O nor read a clock: `backend` feeds it what it hears and sees, with the time. HTTP that answers is no
proof of life (PROTOCOL §1.9), and mere silence is no proof of death: a first load of a model may take minutes.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

from msgspec import Struct

from managers.comfyui.protocol import Queue

_DOUBT_SECONDS = 5.0
_TOLERANCE_SECONDS = 0.01  # a timer may wake us a little early


class WatchConfig(Struct, frozen=True, kw_only=True):
    """How patient to be, in seconds.

    `interrupt`: a run that shows nothing for so long after an interrupt is unmoved. `stall`: a silence of so long is
    told, 0 is never; with `stall_interrupt` such a run is ended.
    """

    interrupt: float = 60
    stall: float = 600
    stall_interrupt: bool = False

    @property
    def doubt(self) -> float:
        """So long prompts may wait while none runs."""
        return min(_DOUBT_SECONDS, self.interrupt)


class StallReason(StrEnum):
    """How it was proven that a worker does not work."""

    NOTHING_RUNS = "nothing_runs"
    UNMOVED = "unmoved"


class Stall(Struct, frozen=True):
    """A ComfyUI that answers but does not work. `since` is epoch ms."""

    reason: StallReason
    words: str
    since: int


class Doubt(Struct, frozen=True):
    """Prompts wait and none runs, as a look at the queue showed at `since` (monotonic seconds)."""

    pending: frozenset[str]
    since: float


def doubted(before: Doubt | None, queue: Queue, now: float) -> Doubt | None:
    """What a look at the queue leaves of a doubt, or begins. A prompt that waits no more shows that all is well."""
    if queue.queue_running or not queue.queue_pending:
        return None
    pending = frozenset(item.prompt_id for item in queue.queue_pending)
    return before if before is not None and before.pending <= pending else Doubt(pending, now)


class Watchdog:
    """All times are monotonic seconds, but for `Stall.since`."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.stall: Stall | None = None
        self.stalls: Counter[StallReason] = Counter()
        self.executing: str | None = None
        self._heard = 0.0
        self._doubt: Doubt | None = None
        self._killers: set[str] = set()

    # ---- what is heard and seen

    def heard(self, prompt_id: str, now: float) -> None:
        """A frame was about this prompt: its worker lives."""
        self._doubt = None
        if prompt_id == self.executing:
            self._heard = now

    def runs(self, prompt_id: str, now: float) -> None:
        """It executes: ComfyUI said so."""
        self._killers.discard(prompt_id)
        if self.executing != prompt_id:
            self.executing, self._heard = prompt_id, now

    def left(self, prompt_id: str) -> None:
        """It executes no more."""
        if self.executing == prompt_id:
            self.executing = None

    def looked(self, queue: Queue, now: float) -> None:
        """This is in ComfyUI's queue."""
        self._doubt = doubted(self._doubt, queue, now)

    def broke(self, *, charged: bool) -> None:
        """The socket is gone. `charged`: if ComfyUI has died, then of what it executed; never of a stall's repair."""
        if charged and self.stall is None and self.executing is not None:
            self._killers.add(self.executing)
        self.executing, self._doubt = None, None

    def forget(self, prompt_id: str) -> None:
        """Nobody will ask for it any more."""
        self._killers.discard(prompt_id)

    # ---- what follows

    def silence(self, now: float) -> float:
        """Seconds since the last word about the prompt that executes; 0 when none does."""
        return max(0.0, now - self._heard) if self.executing is not None else 0.0

    def silent(self, now: float) -> bool:
        """The silence is long enough to be told."""
        return 0 < self.config.stall <= self.silence(now) + _TOLERANCE_SECONDS

    def unmoved(self, interrupted: float | None, now: float) -> bool:
        """A prompt that still runs has shown nothing for so long, although it was interrupted (PROTOCOL §6)."""
        return interrupted is not None and min(now - interrupted, self.silence(now)) >= self.config.interrupt

    def moves(self, now: float) -> bool:
        """Something of ours executes and has been heard of lately."""
        return self.executing is not None and self.silence(now) < self.config.interrupt

    def idle_worker(self, now: float) -> bool:
        """The same prompts wait for so long, and nothing runs."""
        return self._doubt is not None and now - self._doubt.since + _TOLERANCE_SECONDS >= self.config.doubt

    def doubtful(self) -> bool:
        """Worth another look soon: what was posted does not run, and nothing else of ours does."""
        return self._doubt is not None or self.executing is None

    def died_of(self, prompt_id: str) -> bool:
        """This executed when ComfyUI went away, or when its worker was proven dead; asked once it is absent."""
        return prompt_id in self._killers

    def distrust(self, stall: Stall, *, charged: bool) -> bool:
        """It is proven, and what executes is `charged` with it. False when it was before."""
        if self.stall is not None:
            return False
        self.stall = stall
        self.stalls[stall.reason] += 1
        if charged and self.executing is not None:
            self._killers.add(self.executing)
        return True

    def trust(self) -> None:
        """It works."""
        self.stall, self._doubt = None, None
