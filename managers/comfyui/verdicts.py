"""What an attempt is, what it can come to, and how ComfyUI's words become that. Values and pure conclusions.

Must never do I/O, nor decide where a prompt is: `attempt` finds out, and asks here what it means.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from managers.comfyui.outputs import outputs_of
from managers.comfyui.protocol import End, ExecutionError, HistoryEntry, PreviewFrame
from managers.comfyui.rejection import findings_from_rejection, scrub
from managers.comfyui.tracker import GraphNode, Tracker
from managers.events.types import ErrorType, Finding, LiveEvent, NodeCounts, Output, Preview


class Job(Struct, frozen=True, kw_only=True):
    """One attempt. `posted`: it was found open, so it may be there already. `start_time` is epoch ms, if it ran."""

    workflow_id: str
    prompt_id: str
    graph: bytes
    extra_data: bytes | None
    nodes: dict[str, GraphNode]
    timeout_seconds: float
    posted: bool = False
    start_time: int | None = None


class Result(StrEnum):
    """How an attempt came out. GONE: it was cancelled and ComfyUI has let go of it."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    WITHDRAWN = "withdrawn"
    GONE = "gone"


class Verdict(Struct, frozen=True, kw_only=True):
    """The end of an attempt. Times are epoch ms. `died`: it is lost because ComfyUI died while it executed.

    `unseen`: nobody has seen it start, and it was found open after a restart of ours: perhaps it was never posted, or
    taken back by us. That must not use up the attempts.
    """

    result: Result
    start_time: int | None = None
    end_time: int | None = None
    outputs: tuple[Output, ...] = ()
    outputs_reused: bool = False
    nodes: NodeCounts | None = None
    progress: int | None = None
    error: str | None = None
    error_type: ErrorType | None = None
    errors: tuple[Finding, ...] = ()
    node_id: str | None = None
    node_type: str | None = None
    died: bool = False
    unseen: bool = False

    @property
    def seconds(self) -> float | None:
        """How long it ran, as far as that is known."""
        if self.start_time is None or self.end_time is None:
            return None
        return (self.end_time - self.start_time) / 1000


class Sink(Protocol):
    """Who listens to an attempt. Called on the loop, in order; must not block."""

    def started(self, start_time: int) -> None:
        """ComfyUI executes it since `start_time` (epoch ms)."""
        ...

    def ended(self) -> None:
        """ComfyUI executes it no more; the verdict follows."""
        ...

    def produced(self, node_id: str, outputs: tuple[Output, ...]) -> None:
        """A node has written outputs."""
        ...

    def publish(self, event: LiveEvent) -> None:
        """Progress, node events, previews."""
        ...


def preview(job: Job, frame: PreviewFrame, now: int) -> Preview:
    """A picture of a step, for those who listen. `now` is epoch ms."""
    return Preview(
        timestamp=now,
        workflow_id=job.workflow_id,
        prompt_id=job.prompt_id,
        node_id=frame.node_id,
        display_node_id=frame.display_node_id or frame.node_id,
        mime=frame.mime,
        image=frame.image,
    )


def outputs_in(job: Job, entry: HistoryEntry) -> list[Output]:
    """What the history says that this run gave."""
    return [
        output
        for node_id, node_output in entry.outputs.items()
        if node_id.split(".", 1)[0] in job.nodes  # 0.3.64 may list what other prompts left in its cache
        for output in outputs_of(node_id, node_output)
    ]


def concluded(
    job: Job, tracker: Tracker, end: End, outputs: tuple[Output, ...], *, start_time: int | None, now: int
) -> Verdict:
    """The verdict of a prompt that ended. `start_time` is what the service knows of it; ComfyUI's word goes first."""
    files = [output for output in outputs if output.filename is not None]
    errors = [_blocked(error) for error in tracker.evidence.blocked]
    errors += [_missing(output) for output in files if output.size is None]
    total = len(job.nodes)
    cached = sum(node_id in end.cached for node_id in job.nodes)
    succeeded = end.verdict == "success"
    verdict = Verdict(
        result=Result.COMPLETED,
        start_time=end.start_time or start_time,
        end_time=end.end_time or now,
        outputs=outputs,
        outputs_reused=bool(files) and all(output.node_id in end.cached for output in files),
        nodes=NodeCounts(total=total, done=total, cached=cached) if succeeded else tracker.counts(),
        progress=100 if succeeded else tracker.percent,
        errors=tuple(errors),
    )
    if succeeded:
        return verdict
    if end.verdict == "interrupted" and (verdict.seconds or 0) >= job.timeout_seconds:
        # It was us, even if we have died since.
        return late(tracker, over_time(job), start_time=verdict.start_time, now=verdict.end_time or now)
    if end.verdict == "interrupted":
        return replace(verdict, result=Result.CANCELLED, error="It was interrupted in ComfyUI by somebody else")
    if end.verdict == "unreadable":
        words = "ComfyUI has ended it, and ComfyUI's record of it cannot be understood"
        return replace(verdict, result=Result.FAILED, error=words, error_type="backend")
    error = end.error or ExecutionError(job.prompt_id, exception_message="ComfyUI says error without a reason")
    text = scrub(error.exception_message).strip() or scrub(error.exception_type) or "A node failed"
    node = job.nodes.get(error.node_id)
    return replace(
        verdict,
        result=Result.FAILED,
        error=f"{node.name} (node {error.node_id}): {text}" if node else text,
        error_type="oom" if is_out_of_memory(error) else "node",
        node_id=error.node_id or None,
        node_type=error.node_type or None,
    )


def refused(body: object, *, said: str, otherwise: str, now: int) -> Verdict:
    """ComfyUI's answer to POST /prompt is a no; `otherwise` is the reason where `body` names none."""
    findings = tuple(findings_from_rejection(body)) if isinstance(body, dict) else ()
    text = "; ".join(dict.fromkeys(finding.message for finding in findings)) or otherwise
    return Verdict(
        result=Result.FAILED, end_time=now, error=f"{said}: {text}", error_type="validation", errors=findings
    )


def over_time(job: Job) -> str:
    """Why it was stopped."""
    return f"The workflow ran longer than its time limit of {job.timeout_seconds:g} s"


def late(tracker: Tracker, words: str, *, start_time: int | None, now: int) -> Verdict:
    """It was stopped because it took too long, or was too quiet."""
    return Verdict(
        result=Result.FAILED,
        start_time=start_time,
        end_time=now,
        nodes=tracker.counts(),
        progress=tracker.percent,
        error=words,
        error_type="timeout",
    )


def is_out_of_memory(error: ExecutionError) -> bool:
    """By class or by text: a plain RuntimeError has only the text (PROTOCOL §5)."""
    return "OutOfMemory" in error.exception_type or "out of memory" in error.exception_message.lower()


def _blocked(error: ExecutionError) -> Finding:
    return Finding(
        code="execution_blocked",
        message=scrub(error.exception_message).strip() or "A node blocked this branch",
        severity="warning",
        node_id=error.node_id or None,
        class_type=error.node_type or None,
    )


def _missing(output: Output) -> Finding:
    return Finding(
        code="output_missing",
        message=f"ComfyUI names {output.filename}, which is not in its folder (a cached run does not write it anew)",
        severity="warning",
        node_id=output.node_id,
    )
