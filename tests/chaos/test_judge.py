"""The judge against evidence in which one thing is wrong: each promise has a lie that it sees through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from management_api.simulator.ledger import Line
from tests.chaos.clients import Told
from tests.chaos.evidence import Event, Evidence, Store
from tests.chaos.judge import judge
from tests.chaos.plan import Job, Plan, make
from tests.chaos.processes import Life

WORKFLOW = "00000000-0000-4000-8000-000000000001"
COMFYUI, NEXT_COMFYUI, SERVICE, NEXT_SERVICE = 11, 12, 21, 22


def line(at: float, event: str, prompt: str | None = "p1", pid: int = COMFYUI, **more: Any) -> Line:
    marker = "job-0" if event in ("taken", "begun", "ended", "deleted", "interrupted") else None
    raw = {
        "at": at,
        "pid": pid,
        "event": event,
        "marker": marker,
        **({"prompt_id": prompt} if prompt else {}),
        **more,
    }
    return msgspec.convert(raw, Line)


def attempt(prompt: str, number: int, state: str, end: float, *, died: bool = False) -> dict[str, Any]:
    return {"promptId": prompt, "attempt": number, "state": state, "endTime": round(end * 1000), "died": died}


def execution(at: float, prompt: str, pid: int) -> list[Line]:
    """Ten ms from the POST to the end, which is heard over the socket and read from the history."""
    return [
        line(at, "taken", prompt, pid),
        line(at + 0.001, "begun", prompt, pid),
        line(at + 0.010, "ended", prompt, pid, verdict="execution_success"),
        line(at + 0.011, "told", prompt, pid, socket=1),
        line(at + 0.012, "told", prompt, pid),
    ]


def events(*kinds: str, workflow: str = WORKFLOW) -> tuple[Event, ...]:
    return tuple(
        Event(
            seq=seq,
            type=f"workflow:{kind.removesuffix('-again')}",
            workflow_id=workflow,
            again=kind.endswith("-again"),
        )
        for seq, kind in enumerate(kinds, 1)
    )


def evidence(
    ledger: list[Line],
    attempts: list[dict[str, Any]],
    kinds: tuple[str, ...],
    *,
    lives: tuple[Life, ...] = (),
    view: dict[str, Any] | None = None,
) -> Evidence:
    """One workflow, a picture, whose last attempt decides."""
    job = Job(number=0, kind="picture", color=255, width=32, height=32, steps=2, priority="normal")
    told = events(*kinds)
    found = {
        "status": "completed",
        "errorType": None,
        "error": None,
        "completionTime": 20_000,
        "promptId": attempts[-1]["promptId"],
        "attempts": attempts,
        **(view or {}),
    }
    return Evidence(
        plan=Plan(1, ("local",), (job,), ()),
        lives=lives or (Life(name="local", pid=COMFYUI, since=1), Life(name="service", pid=SERVICE, since=1)),
        ledgers={"local": (line(1.5, "start", None), line(2, "socket", None, socket=1), *ledger)},
        told={"job-0": Told(marker="job-0", workflow_id=WORKFLOW)},
        views={"job-0": found},
        events={"job-0": told},
        files={"job-0": ("",) if found["status"] == "completed" else ()},
        heard=told,
        store=Store(integrity="ok", log=told, workflows=1),
    )


def clean() -> Evidence:
    """Executed once, heard, stored."""
    return evidence(
        execution(10, "p1", COMFYUI), [attempt("p1", 1, "ended", 10.02)], ("queued", "started", "completed")
    )


def twice(*, heard: bool = True, service_until: float | None = 10.2, settled: float = 15.0) -> Evidence:
    """It ended at 10.010, ComfyUI was killed at 12, the attempt was called lost, and it was executed again."""
    first = execution(10, "p1", COMFYUI)
    lives = [
        Life(name="local", pid=COMFYUI, since=1, until=12),
        Life(name="local", pid=NEXT_COMFYUI, since=12),
        Life(name="service", pid=SERVICE, since=1, until=service_until),
    ]
    if service_until is not None:
        lives.append(Life(name="service", pid=NEXT_SERVICE, since=service_until))
    return evidence(
        [
            *(first if heard else first[:3]),
            line(12.5, "start", None, NEXT_COMFYUI),
            line(13, "socket", None, NEXT_COMFYUI, socket=1),
            *execution(16, "p2", NEXT_COMFYUI),
        ],
        [attempt("p1", 1, "lost", settled), attempt("p2", 2, "ended", 16.02)],
        ("queued", "started", "error-again", "queued", "started", "completed"),
        lives=tuple(lives),
    )


def deaths(count: int, kind: str = "poison") -> Evidence:
    """ComfyUI was killed so many times while it executed this, which is called poison."""
    ledger, lives, attempts = [], [Life(name="service", pid=SERVICE, since=1)], []
    for n in range(count):
        at, pid = 10.0 + 5 * n, COMFYUI + 100 * n
        ledger += [line(at, "taken", f"p{n}", pid), line(at + 0.1, "begun", f"p{n}", pid)]
        lives.append(Life(name="local", pid=pid, since=at - 2, until=at + 1))
        attempts.append(attempt(f"p{n}", n + 1, "lost", at + 3, died=True))
    told = ("queued", "started", *(("error-again", "queued", "started") * (count - 1)), "error")
    return evidence(ledger, attempts, told, lives=tuple(lives), view={"status": "failed", "errorType": kind})


def faults(found: Evidence) -> str:
    return "\n".join(judge(found).faults)


# ---- what is right


@pytest.mark.parametrize(
    "right",
    [
        pytest.param(clean, id="once"),
        pytest.param(twice, id="the service that was told died at once"),
        pytest.param(lambda: twice(heard=False, service_until=9.5), id="no service was there"),
        pytest.param(lambda: deaths(2), id="two deaths"),
    ],
)
def test_right(right: Callable[[], Evidence]) -> None:
    assert faults(right()) == ""


def test_an_excused_end_is_counted() -> None:
    counts = judge(twice()).counts
    assert counts["executed again: nobody who lived could know of the end"] == 1


# ---- what is wrong


def changed(base: Evidence, **view: Any) -> Evidence:
    return replace(base, views={"job-0": {**base.views["job-0"], **view}})


def with_lines(*lines: Line, base: Evidence | None = None) -> Evidence:
    base = base or clean()
    return replace(base, ledgers={"local": base.ledgers["local"] + lines})


def with_attempt(**fields: Any) -> Evidence:
    base = clean()
    return changed(base, attempts=[{**base.views["job-0"]["attempts"][0], **fields}])


def with_events(*kinds: str, log: tuple[Event, ...] | None = None) -> Evidence:
    told = events(*kinds)
    base = replace(clean(), events={"job-0": told}, heard=told)
    return replace(base, store=replace(base.store, log=told if log is None else log))


def answered(status: str) -> Evidence:
    return replace(clean(), told={"job-0": Told(marker="job-0", workflow_id=WORKFLOW, cancel=status)})


def ended_by_itself() -> Evidence:
    base = clean()
    return replace(base, lives=(*base.lives, Life(name="service", pid=99, since=1, until=2, status=1)))


LIES: dict[str, tuple[Callable[[], Evidence], str]] = {
    "executed twice": (lambda: with_lines(*execution(11, "p2", COMFYUI)), "executed again after its end was known"),
    "executed again and cut off": (
        lambda: with_lines(line(11, "taken", "p2"), line(11.1, "begun", "p2")),
        "executed again after its end was known",
    ),
    "twice although the service that was told lived on": (
        lambda: twice(service_until=None),
        "p1 had ended, and was not its only end",
    ),
    "twice although it had the time to store it": (
        lambda: twice(service_until=10.5),
        "p1 had ended, and was not its only end",
    ),
    "twice, called lost by the one who was told": (
        lambda: twice(service_until=10.2, settled=10.1),
        "p1 had ended, and was not its only end",
    ),
    "twice, called lost before ComfyUI died": (
        lambda: twice(heard=False, service_until=9.5, settled=11.0),
        "p1 had ended, and was not its only end",
    ),
    "twice although it could ask": (
        lambda: replace(
            twice(heard=False, service_until=None),
            lives=(
                Life(name="local", pid=COMFYUI, since=1, until=14),
                Life(name="local", pid=NEXT_COMFYUI, since=12),
                Life(name="service", pid=SERVICE, since=1),
            ),
        ),
        "p1 had ended, and was not its only end",
    ),
    "the same prompt id again": (lambda: with_lines(line(12, "taken")), "took the prompt p1 twice"),
    "posted before it was stored": (lambda: with_lines(line(9, "taken", "p9")), "got p9, which is no attempt"),
    "work of nobody": (
        lambda: with_lines(line(9, "taken", "p9", marker="job-7")),
        "given work nobody handed in: job-7",
    ),
    "never executed": (lambda: replace(clean(), ledgers={"local": ()}), "its last prompt did not end so"),
    "another verdict": (lambda: changed(clean(), status="failed", errorType="node"), "it is failed (node: None)"),
    "lost for good": (lambda: deaths(2, "lost"), "it is failed (lost: None)"),
    "poison after one death": (lambda: deaths(1), "called poison, with 1 deaths"),
    "poison missed": (lambda: deaths(2, "node"), "2 deaths are stored, and it is failed"),
    "a death that was none": (lambda: with_attempt(died=True), "ComfyUI is said to have died of p1"),
    "lost although it was there": (lambda: with_attempt(state="lost"), "p1 is called lost, and ComfyUI had it"),
    "withdrawn although it ran": (
        lambda: with_attempt(state="withdrawn"),
        "p1 was executed, and is called withdrawn",
    ),
    "an attempt left open": (lambda: with_attempt(state="posted", endTime=None), "the attempt p1 is still posted"),
    "attempts miscounted": (lambda: with_attempt(attempt=2), "the attempts are numbered [2]"),
    "still executing": (
        lambda: replace(clean(), ledgers={"local": clean().ledgers["local"][:4]}),
        "ComfyUI still executes p1",
    ),
    "interrupted": (
        lambda: with_lines(
            line(9, "taken", "p0"),
            line(9, "begun", "p0"),
            line(9.1, "ended", "p0", verdict="execution_interrupted"),
            base=changed(clean(), attempts=[attempt("p0", 1, "ended", 9.2), attempt("p1", 2, "ended", 10.02)]),
        ),
        "p0 was interrupted",
    ),
    "cancelled by nobody": (lambda: changed(clean(), status="cancelled"), "it is cancelled, and nobody asked"),
    "a cancel that did not last": (lambda: answered("cancelled"), "DELETE was answered with cancelled, now it is"),
    "posted after its cancel": (
        lambda: with_lines(line(30, "taken", "p2"), base=changed(clean(), status="cancelled")),
        "ComfyUI got p2 after it was cancelled",
    ),
    "too many in ComfyUI": (
        lambda: with_lines(*(line(9.0, "taken", f"q{n}") for n in range(3))),
        "3 prompts were in local at once",
    ),
    "a hole in the log": (
        lambda: with_events("queued", "started", "completed", log=events("queued", "started", "completed")[::2]),
        "the log has holes",
    ),
    "no final event": (lambda: with_events("queued", "started"), "by its events it is running, and it is completed"),
    "two final events": (
        lambda: with_events("queued", "started", "completed", "completed"),
        "completed was told when it was completed",
    ),
    "an event of another workflow": (
        lambda: replace(clean(), store=Store(integrity="ok", log=events("queued", workflow="x"), workflows=1)),
        "its events are not those of the log",
    ),
    "a stream that missed one": (
        lambda: replace(clean(), heard=clean().heard[:-1]),
        "a stream that resumed missed 1 events",
    ),
    "a stream that heard one twice": (
        lambda: replace(clean(), heard=(*clean().heard, clean().heard[0])),
        "heard events twice",
    ),
    "a stream that heard what is not stored": (
        lambda: replace(clean(), heard=(*clean().heard, replace(clean().heard[0], seq=9))),
        "a stream heard",
    ),
    "a damaged store": (
        lambda: replace(clean(), store=replace(clean().store, integrity="page 3")),
        "the store is damaged: page 3",
    ),
    "a workflow stored twice": (
        lambda: replace(clean(), store=replace(clean().store, workflows=2)),
        "2 workflows are stored, 1 were accepted",
    ),
    "a file that is wrong": (lambda: replace(clean(), files={"job-0": ("x answers 410",)}), "x answers 410"),
    "a file that is missing": (lambda: replace(clean(), files={"job-0": ()}), "it has 0 files, not 1"),
    "never accepted": (lambda: replace(clean(), views={}), "job-0: it was never accepted"),
    "the service fell over": (ended_by_itself, "service (pid 99) ended by itself with status 1"),
    "seen on the way": (lambda: replace(clean(), faults=("the stream is behind",)), "the stream is behind"),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong(lie: str) -> None:
    make_evidence, complaint = LIES[lie]
    assert complaint in faults(make_evidence())


# ---- the plan


def test_the_plan_comes_from_the_seed_alone() -> None:
    assert make(seed=7, kills=50, workflows=40) == make(seed=7, kills=50, workflows=40)
    assert make(seed=7, kills=50, workflows=40) != make(seed=8, kills=50, workflows=40)


def test_there_is_work_left_for_the_last_kill() -> None:
    plan = make(seed=1, kills=50, workflows=300)
    assert plan.due(0) < plan.due(25) < plan.due(49) == 300
    assert len({job.color for job in plan.jobs}) == 300
    assert {victim for kill in plan.kills for victim in kill.victims} == {"service", "local"}
