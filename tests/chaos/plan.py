"""What shall happen in a run: the work, and the kills. Everything comes from the seed; nothing here does anything."""

from __future__ import annotations

import random
from typing import Any, Literal

from msgspec import Struct

Graph = dict[str, Any]
Kind = Literal["picture", "steps", "chain", "pair", "broken"]
Moment = Literal["seconds", "submitting", "taken", "begun", "ended", "told"]
Mark = Literal["submitting", "taken", "begun", "ended", "told"]

STEP_SECONDS = 0.05
MAX_ATTEMPTS = 100
LONGEST_WAIT = 8.0
"""Seconds after which a kill falls although what it waits for has not happened (the queue may be empty)."""
_KINDS: tuple[Kind, ...] = ("picture", "steps", "steps", "steps", "chain", "chain", "pair", "broken")
_LATER = (0.0, 0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.2)


class Job(Struct, frozen=True, kw_only=True):
    """One workflow. `cancel`: seconds after its 202 to cancel it; `again`: the same POST is sent once more."""

    number: int
    kind: Kind
    color: int
    width: int
    height: int
    steps: int
    priority: Literal["high", "normal", "low"]
    cancel: float | None = None
    again: bool = False

    @property
    def marker(self) -> str:
        """Its name everywhere: the Idempotency-Key, and `extra_data.queue_id` in ComfyUI's ledger."""
        return f"job-{self.number}"

    @property
    def files(self) -> int:
        """How many files it writes when it ends well."""
        return {"broken": 0, "pair": 2}.get(self.kind, 1)

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour of every pixel of these files."""
        found = self.color >> 16 & 255, self.color >> 8 & 255, self.color & 255
        return (255 - found[0], 255 - found[1], 255 - found[2]) if self.kind == "chain" else found

    def body(self) -> dict[str, Any]:
        """What is posted, the same each time."""
        return {
            "workflow": self._graph(),
            "priority": self.priority,
            "maxAttempts": MAX_ATTEMPTS,
            "extraData": {"queue_id": self.marker},
        }

    def _graph(self) -> Graph:
        size = {"width": self.width, "height": self.height, "batch_size": 2 if self.kind == "pair" else 1}
        graph: Graph = {"1": {"class_type": "EmptyImage", "inputs": {**size, "color": self.color}}}
        last = "1"
        if self.kind in ("steps", "broken"):
            last = self._sleep(graph, "2", last, self.steps)
        elif self.kind == "chain":
            last = self._sleep(graph, "2", last, self.steps // 2)
            graph["3"] = {"class_type": "ImageInvert", "inputs": {"image": [last, 0]}}
            last = self._sleep(graph, "4", "3", self.steps - self.steps // 2)
        graph["9"] = {"class_type": "SaveImage", "inputs": {"images": [last, 0], "filename_prefix": "chaos"}}
        return graph

    def _sleep(self, graph: Graph, node: str, source: str, steps: int) -> str:
        fail = {"fail": "value_error", "fail_at_step": steps} if self.kind == "broken" else {}
        inputs = {"image": [source, 0], "steps": steps, "seconds_per_step": STEP_SECONDS, "seed": self.number}
        inputs |= {"preview": False, "fail": "none", "fail_at_step": 0, **fail}
        graph[node] = {"class_type": "SleepSteps", "inputs": inputs}
        return node


class Kill(Struct, frozen=True):
    """`victims` die `later` seconds after `count` moments of this kind since the kill before."""

    number: int
    victims: tuple[str, ...]
    moment: Moment
    count: float
    later: float


class Plan(Struct, frozen=True):
    """A run."""

    seed: int
    backends: tuple[str, ...]
    jobs: tuple[Job, ...]
    kills: tuple[Kill, ...]

    def due(self, kills: int) -> int:
        """How many jobs are handed in after so many kills: there shall be work left for the last one."""
        if not self.kills:
            return len(self.jobs)
        share = (kills + 1) / len(self.kills)
        return min(len(self.jobs), int(share * len(self.jobs)) + 5)


def make(*, seed: int, kills: int, workflows: int, backends: int = 1) -> Plan:
    """The plan of this seed. With many kills for few workflows, these take longer."""
    dice = random.Random(f"{seed}/{kills}/{workflows}/{backends}")
    mean = min(1.5, max(0.1, 1.4 * kills / max(workflows, 1))) / STEP_SECONDS
    names = ("local",) if backends == 1 else tuple(f"gpu{number}" for number in range(1, backends + 1))
    colors = dice.sample(range(0x1000000), workflows)  # each its own, so that no cache answers for it
    jobs = tuple(_job(dice, number, color, mean) for number, color in enumerate(colors))
    return Plan(seed, names, jobs, tuple(_kill(dice, number, names) for number in range(1, kills + 1)))


def _job(dice: random.Random, number: int, color: int, mean_steps: float) -> Job:
    return Job(
        number=number,
        kind=dice.choice(_KINDS),
        color=color,
        width=dice.randrange(16, 65),
        height=dice.randrange(16, 65),
        steps=max(2, round(dice.uniform(0.3, 1.7) * mean_steps)),
        priority=dice.choice(("high", "normal", "normal", "low")),
        cancel=round(dice.uniform(0, 2), 3) if dice.random() < 0.12 else None,
        again=dice.random() < 0.1,
    )


def _kill(dice: random.Random, number: int, names: tuple[str, ...]) -> Kill:
    comfyui = dice.choice(names)
    victims = dice.choice((("service",), ("service",), ("service",), (comfyui,), (comfyui,), ("service", comfyui)))
    if dice.random() < 0.4:
        seconds = dice.uniform(0, 0.8) if dice.random() < 0.25 else dice.uniform(0.8, 4.5)
        return Kill(number, victims, "seconds", round(seconds, 3), 0.0)
    marks: tuple[Mark, ...] = ("submitting", "taken", "begun", "ended", "told")
    return Kill(number, victims, dice.choice(marks), dice.randrange(1, 4), dice.choice(_LATER))
