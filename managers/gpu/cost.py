"""What a run takes of its cards, from samples. Pure: times and values in, a `Cost` out.

Must never tell a value that covers only a part of the run: what was not seen is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET, Struct

from managers.events.types import Cost
from managers.gpu.values import Gpu

GAP_SECONDS = 10.0
"""Between two samples further apart than this nobody knows what power was drawn, or how high the memory went."""


class Part(Struct, frozen=True, kw_only=True):
    """What a run has of one card at a moment: its energy counter (J), its power (W), memory in use (bytes)."""

    gpu_id: str
    energy: float | None = None
    power: float | None = None
    memory: int | None = None


class _Mark(Struct, frozen=True):
    at: float
    part: Part
    watts: float | None


class Meter:
    """One run, from `start` (seconds of the monotonic clock). `feed` it what was sampled, in order."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._until = start
        self._marks: dict[str, _Mark] = {}
        self._joules: float | None = 0.0
        self._peak: int | None = None
        self._seamless = True
        self._measurable = True

    def feed(self, at: float, parts: Sequence[Part]) -> None:
        """A sample; the newest one from before the start is welcome too, and says what the cards did until then."""
        if not parts:
            return
        first = not self._marks
        for part in parts:
            before = self._marks.get(part.gpu_id)
            if before is not None:
                joules, watts = self._between(before, at, part)
            else:
                # The first sample came after the start. A card that joins later was not in use until then.
                joules, watts = _flat(part.power, at - self._start) if first else 0.0, part.power
            self._joules = _sum((self._joules, joules))
            self._marks[part.gpu_id] = _Mark(at, part, watts)
        if at >= self._start:
            self._seamless = self._seamless and at - self._until <= GAP_SECONDS
            self._until = at
            memory = [part.memory for part in parts if part.memory is not None]
            self._measurable = self._measurable and len(memory) == len(parts)
            self._peak = max(self._peak or 0, sum(memory))

    def cost(self, end: float) -> Cost | None:
        """The cost up to `end`; what happened since the newest sample goes on as it was. None: no card is known."""
        if not self._marks:
            return None
        tails = (_flat(mark.watts, end - max(mark.at, self._start)) for mark in self._marks.values())
        joules = _sum((self._joules, *tails))
        told = self._seamless and self._measurable and end - self._until <= GAP_SECONDS
        return Cost(
            gpu_seconds=round(max(end - self._start, 0.0) * len(self._marks), 3),
            vram_peak_bytes=self._peak if told and self._peak is not None else UNSET,
            energy_joules=UNSET if joules is None else round(joules, 3),
        )

    def _between(self, before: _Mark, at: float, part: Part) -> tuple[float | None, float | None]:
        """Joules within the run from one sample to the next, and the power it ends with.

        By the counter; where there is none, or it began anew with its driver, by the mean of the two powers.
        """
        span = at - before.at
        inside = at - max(before.at, self._start)
        then, now = before.part, part
        if span <= 0:
            return 0.0, before.watts
        if then.energy is not None and now.energy is not None and now.energy >= then.energy:
            rate = (now.energy - then.energy) / span
            return rate * max(inside, 0.0), rate if now.power is None else now.power
        if inside <= 0:
            return 0.0, now.power
        if then.power is None or now.power is None or span > GAP_SECONDS:
            return None, now.power
        at_begin = now.power - (now.power - then.power) * inside / span
        return (at_begin + now.power) / 2 * inside, now.power


def parts_of(gpus: Iterable[Gpu], backend: str, *, cards: Sequence[str] = (), cpu_only: bool = False) -> list[Part]:
    """What a run on `backend` has of these cards: of those its process is on; else of those it may be on.

    `cards` are the ids that were configured for it. `cpu_only`: its ComfyUI says that it uses none.
    """
    whole = [gpu for gpu in gpus if not gpu.split]
    chosen = [gpu for gpu in whole if gpu.gpu_id in cards] if cards else [gpu for gpu in whole if backend in _on(gpu)]
    if not chosen and not cards and not cpu_only:
        chosen = [gpu for gpu in whole if not _on(gpu)]
    return [
        Part(gpu_id=gpu.gpu_id, energy=gpu.energy, power=gpu.power, memory=_memory(gpu, backend)) for gpu in chosen
    ]


def _on(gpu: Gpu) -> set[str]:
    return {process.backend for process in gpu.processes or () if process.backend is not None}


def _memory(gpu: Gpu, backend: str) -> int | None:
    """That of the backend's own processes where the driver tells it, else all that is in use."""
    own = [process.memory for process in gpu.processes or () if process.backend == backend]
    told = [memory for memory in own if memory is not None]
    return sum(told) if told and len(told) == len(own) else gpu.memory_used


def _flat(watts: float | None, seconds: float) -> float | None:
    if seconds <= 0:
        return 0.0
    return None if watts is None or seconds > GAP_SECONDS else watts * seconds


def _sum(joules: Iterable[float | None]) -> float | None:
    """Unknown as soon as one is."""
    total = 0.0
    for one in joules:
        if one is None:
            return None
        total += one
    return total
