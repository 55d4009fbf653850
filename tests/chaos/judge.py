"""Whether what happened is what was promised. Pure: evidence in, faults and counts out.

Every workflow was executed to its end exactly once. A second execution is excused only by `_excuse`: the words there
are those of docs/reliability.md.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from msgspec import Struct

from managers.workflows.model import POISON_DEATHS
from tests.chaos.evidence import Event, Evidence, View
from tests.chaos.history import History, Run, read
from tests.chaos.plan import Job
from tests.chaos.processes import SERVICE

STORE_SECONDS = 0.25
"""For a service that has been told of an end to write it down; in fact some milliseconds."""
ASK_SECONDS = 3.0
"""For a service that is connected to ask where a prompt is; in fact at once, and each second while it fails."""
POST_SECONDS = 2.0
"""How late a POST may arrive that had left before a cancel."""
AT_ONCE = 2
"""Prompts of ours in one ComfyUI: one that executes, one that waits behind it."""

LATEST = "… the longest that one lived after being told, ms"
_ENDED = {"completed": "success", "failed": "error"}


class Report(Struct):
    """What is wrong, and how often what happened."""

    faults: list[str]
    counts: Counter[str]


def judge(evidence: Evidence) -> Report:
    """All of it."""
    report = Report(list(evidence.faults), Counter())
    history = read(evidence.ledgers, evidence.lives)
    report.faults += [f"ComfyUI took the prompt {prompt_id} twice" for prompt_id in history.twice]
    report.faults += history.odd
    _processes(evidence, report)
    _crowd(history, report)
    _log(evidence, report)
    _listener(evidence, report)
    for job in evidence.plan.jobs:
        if job.marker not in evidence.views:
            report.faults.append(f"{job.marker}: it was never accepted")
            continue
        about = _Judgement(job, evidence, history.of(job.marker), report)
        about.all()
    known = {job.marker for job in evidence.plan.jobs}
    report.faults += [f"ComfyUI was given work nobody handed in: {marker}" for marker in history.runs.keys() - known]
    report.counts["workflows"] = len(evidence.plan.jobs)
    report.counts["prompts in ComfyUI"] = len(history.all())
    return report


def _processes(evidence: Evidence, report: Report) -> None:
    for life in evidence.lives:
        if life.status is not None:
            report.faults.append(f"{life.name} (pid {life.pid}) ended by itself with status {life.status}")
    for kill in evidence.plan.kills:
        report.counts.update(f"kills of {SERVICE if victim == SERVICE else 'ComfyUI'}" for victim in kill.victims)


def _crowd(history: History, report: Report) -> None:
    for run in history.all():
        there = [
            other
            for other in history.all()
            if (other.backend, other.pid) == (run.backend, run.pid)
            and other.taken <= run.taken
            and not any(end is not None and end <= run.taken for end in (other.ended, other.deleted))
        ]
        if len(there) > AT_ONCE:
            report.faults.append(f"{len(there)} prompts were in {run.backend} at once, the last one {run.prompt_id}")


def _log(evidence: Evidence, report: Report) -> None:
    store = evidence.store
    if store.integrity != "ok":
        report.faults.append(f"the store is damaged: {store.integrity}")
    if store.workflows != len(evidence.told):
        report.faults.append(f"{store.workflows} workflows are stored, {len(evidence.told)} were accepted")
    if [event.seq for event in store.log] != list(range(1, len(store.log) + 1)):
        report.faults.append("the log has holes, or does not begin at 1")
    report.counts["events in the log"] = len(store.log)


def _listener(evidence: Evidence, report: Report) -> None:
    seqs = [event.seq for event in evidence.heard]
    if any(later <= before for before, later in pairwise(seqs)):
        report.faults.append("a stream that resumed heard events twice, or in a wrong order")
    logged = {event.seq: event for event in evidence.store.log}
    for event in evidence.heard:
        if event.seq not in logged or logged[event.seq].type != event.type:
            report.faults.append(f"a stream heard {event}, the log has {logged.get(event.seq)}")
    missed = {event.seq for event in evidence.store.log if event.type.startswith("workflow:")} - set(seqs)
    if missed:
        report.faults.append(f"a stream that resumed missed {len(missed)} events, the first with seq {min(missed)}")


class _Judgement:
    """One workflow."""

    def __init__(self, job: Job, evidence: Evidence, runs: list[Run], report: Report) -> None:
        self.job = job
        self.runs = runs
        self.report = report
        self.told = evidence.told[job.marker]
        self.view: View = evidence.views[job.marker]
        self.events = evidence.events[job.marker]
        self.files = evidence.files[job.marker]
        self.logged = tuple(event for event in evidence.store.log if event.workflow_id == self.told.workflow_id)
        self.status: str = self.view["status"]
        self.attempts: dict[str, dict[str, Any]] = {one["promptId"]: one for one in self.view["attempts"]}

    def all(self) -> None:
        self._verdict()
        self._attempts()
        self._executions()
        self._events()
        self._files()
        self.report.counts["POSTs repeated"] += self.told.posts - 1
        self.report.counts["POSTs repeated that were known already"] += self.told.replays

    def wrong(self, what: str) -> None:
        self.report.faults.append(f"{self.job.marker} ({self.job.kind}, {self.told.workflow_id}): {what}")

    # ---- the verdict

    def _verdict(self) -> None:
        self.report.counts[f"ended {self.status}" + (" (poison)" if self._poisoned else "")] += 1
        asked = self.told.cancel
        if asked is not None and asked != self.status:
            self.wrong(f"DELETE was answered with {asked}, now it is {self.status}")
        if self.status == "cancelled":
            if asked is None:
                self.wrong("it is cancelled, and nobody asked for that")
            after = self.view["completionTime"] / 1000 + POST_SECONDS
            for run in self.runs:
                if run.taken > after:
                    self.wrong(f"ComfyUI got {run.prompt_id} after it was cancelled")
        elif self._poisoned:
            deaths = [run for run in self.runs if run.cut or self._excuse(run)]
            if len(deaths) < POISON_DEATHS:
                self.wrong(f"it is called poison, with {len(deaths)} deaths in the ledger: {self._story()}")
        else:
            wanted = ("failed", "node") if self.job.kind == "broken" else ("completed", None)
            if (self.status, self.view["errorType"]) != wanted:
                self.wrong(f"it is {self.status} ({self.view['errorType']}: {self.view['error']}): {self._story()}")

    @property
    def _poisoned(self) -> bool:
        return self.status == "failed" and self.view["errorType"] == "poison"

    # ---- the attempts, against the ledger

    def _attempts(self) -> None:
        in_comfyui = {run.prompt_id: run for run in self.runs}
        for prompt_id in in_comfyui.keys() - self.attempts.keys():
            self.wrong(f"ComfyUI got {prompt_id}, which is no attempt in the store")
        charged = [one["attempt"] for one in self.attempts.values() if one["state"] != "withdrawn"]
        if charged != list(range(1, len(charged) + 1)):
            self.wrong(f"the attempts are numbered {charged}")
        deaths = sum(one["died"] for one in self.attempts.values())
        if deaths > POISON_DEATHS or (deaths == POISON_DEATHS and not (self._poisoned or self.status == "cancelled")):
            self.wrong(f"{deaths} deaths are stored, and it is {self.status}")
        for prompt_id, attempt in self.attempts.items():
            self._attempt(attempt, in_comfyui.get(prompt_id))

    def _attempt(self, attempt: dict[str, Any], run: Run | None) -> None:
        state, prompt_id = attempt["state"], attempt["promptId"]
        self.report.counts[f"attempts {state}"] += 1
        if state in ("posted", "running"):
            self.wrong(f"the attempt {prompt_id} is still {state}")
        if attempt["died"] and (state != "lost" or run is None or run.begun is None or run.died is None):
            self.wrong(f"ComfyUI is said to have died of {prompt_id}, and did not: {self._story()}")
        if run is None:
            return
        settled = attempt["endTime"] / 1000 if attempt["endTime"] is not None else float("inf")
        if state == "withdrawn" and run.begun is not None:
            self.wrong(f"{prompt_id} was executed, and is called withdrawn: {self._story()}")
        kept = run.taken <= settled and run.deleted is None and (run.died is None or run.died > settled)
        if state == "lost" and kept:
            self.wrong(f"{prompt_id} is called lost, and ComfyUI had it: {self._story()}")

    # ---- the executions, by the ledger

    def _executions(self) -> None:
        for run in self.runs:
            if run.begun is not None and run.ended is None and run.died is None:
                self.wrong(f"ComfyUI still executes {run.prompt_id}")
            if run.cut:
                self.report.counts["executions cut off by the death of ComfyUI"] += 1
            if run.verdict == "interrupted" and self.status != "cancelled" and not self._is_lost(run):
                self.wrong(f"{run.prompt_id} was interrupted: {self._story()}")
        ends = [run for run in self.runs if run.verdict in ("success", "error")]
        if self.status in _ENDED and not self._poisoned:
            decisive = next((run for run in ends if run.prompt_id == self.view["promptId"]), None)
            if decisive is None or decisive.verdict != _ENDED[self.status]:
                self.wrong(f"it is {self.status}, and its last prompt did not end so: {self._story()}")
            elif any(run.begun is not None and run.begun > (decisive.begun or 0) for run in self.runs):
                self.wrong(f"it was executed again after its end was known: {self._story()}")
            further = [run for run in ends if run is not decisive]
        elif self.status == "cancelled":
            further = ends[:-1]  # success may win the race against its removal
        else:
            further = ends
        for run in further:
            if self._excuse(run):
                self.report.counts["executed again: nobody who lived could know of the end"] += 1
                late = max(
                    (word.heard_by.until - word.at for word in run.words if word.heard_by and word.heard_by.until),
                    default=0,
                )
                self.report.counts[LATEST] = max(self.report.counts[LATEST], round(late * 1000))
            else:
                self.wrong(f"{run.prompt_id} had ended, and was not its only end: {self._story()}")

    def _excuse(self, run: Run) -> bool:
        """Whether an end may be followed by another execution.

        Its ComfyUI was killed after it, and then the attempt was called lost; and no service could have stored the
        verdict: each that was told of the end (over its socket or by the history) was killed within `STORE_SECONDS`
        of the word and before the attempt was called lost, and none was connected for `ASK_SECONDS` between the end
        and the death without being told.
        """
        attempt = self.attempts.get(run.prompt_id)
        if run.ended is None or run.died is None or attempt is None or attempt["state"] != "lost":
            return False
        settled = attempt["endTime"] / 1000
        if run.died > settled:
            return False
        hearers = [(word.at, word.heard_by) for word in run.words if word.heard_by is not None]
        return (bool(hearers) or run.exposed <= ASK_SECONDS) and all(
            life.until is not None and life.until - at <= STORE_SECONDS and life.until <= settled
            for at, life in hearers
        )

    def _is_lost(self, run: Run) -> bool:
        return self.attempts.get(run.prompt_id, {}).get("state") == "lost"

    # ---- the events

    def _events(self) -> None:
        if self.events != self.logged:
            self.wrong("its events are not those of the log")
        before = "new"
        for event in self.events:
            if not event.type.startswith("workflow:"):
                continue
            after = _AFTER.get((before, _kind(event)))
            if after is None:
                self.wrong(f"{_kind(event)} was told when it was {before}: {[_kind(one) for one in self.events]}")
                return
            before = after
        if before != self.status:
            self.wrong(f"by its events it is {before}, and it is {self.status}")

    # ---- the files

    def _files(self) -> None:
        for problem in self.files:
            if problem:
                self.wrong(problem)
        self.report.counts["files that are right"] += sum(not problem for problem in self.files)
        if self.status == "completed" and len(self.files) != self.job.files:
            self.wrong(f"it has {len(self.files)} files, not {self.job.files}")

    def _story(self) -> str:
        """What the ledger and the store say, for whoever has to find out why."""
        return "; ".join(f"{_tale(run)} -> {self.attempts.get(run.prompt_id)}" for run in self.runs)


def _kind(event: Event) -> str:
    return event.type.removeprefix("workflow:") + ("-again" if event.again else "")


def _tale(run: Run) -> str:
    words = [f"{word.at:.3f} to {word.heard_by.pid if word.heard_by else 'nobody'}" for word in run.words]
    return (
        f"{run.prompt_id} taken {run.taken:.3f} begun {_at(run.begun)} ended {_at(run.ended)} {run.verdict or '-'}"
        f" told {words} died {_at(run.died)}"
    )


def _at(moment: float | None) -> str:
    return "-" if moment is None else f"{moment:.3f}"


_AFTER = {
    ("new", "queued"): "queued",
    ("queued", "started"): "running",
    ("queued", "error-again"): "lost",
    ("queued", "error"): "failed",
    ("queued", "cancelled"): "cancelled",
    ("running", "error-again"): "lost",
    ("lost", "queued"): "queued",
    ("running", "completed"): "completed",
    ("running", "error"): "failed",
    ("running", "cancelled"): "cancelled",
}
"""From one status to the next by what is told; nothing follows the final ones."""
