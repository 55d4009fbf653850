"""The port of the store: what the queue needs of a database, and what each call promises.

Must never name a database. Every coroutine that writes returns after the commit is on disk (fsync), and the events
of a commit are told to the listener after it, in `seq` order. Every move is a compare-and-set: one that comes too
late changes nothing and says so by its result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from managers.events.log import EventLog, StoredFrame
from managers.events.types import Cost, ErrorType, StoredEvent
from managers.workflows.course import NodeTime
from managers.workflows.durations import Kind, NodeDuration
from managers.workflows.model import (
    Attempt,
    Claimed,
    Filter,
    IdempotencyKey,
    MadeFrom,
    NewWorkflow,
    Outcome,
    Page,
    Priority,
    QueueCounts,
    Submitted,
    Workflow,
)
from managers.workflows.usage import UsageBooks
from managers.workflows.waiting import Entry


class Snapshot(Struct, frozen=True):
    """Workflows and the last `seq` from one read: events up to `seq` are already in the workflows."""

    seq: int
    workflows: tuple[Workflow, ...]


class OutputOwner(Struct, frozen=True):
    """The run that reported a file."""

    workflow_id: str
    node_id: str


CommitListener = Callable[[Sequence[tuple[StoredEvent, StoredFrame]]], None]


class WorkflowStore(EventLog, UsageBooks, Protocol):
    """The record of every workflow, attempt, output and event, and what they took (`UsageBooks`).

    The end of an attempt that ran adds its cost to the record and to the usage by one transaction, a final verdict
    counts the workflow there; forgetting a workflow takes nothing away. All coroutines may raise `StoreUnavailable`.
    """

    # ---- one workflow in, through, and out

    async def submit(
        self,
        new: NewWorkflow,
        *,
        key: IdempotencyKey | None = None,
        max_waiting: int | None = None,
        max_queued: int | None = None,
    ) -> Submitted:
        """Store the workflow (queued, or failed when `new.failure` says so) and its event.

        Raises `Conflict` when the id is known, `IdempotencyMismatch`, `QueueFull` when `max_waiting` wait, and
        `ShareFull` when `max_queued` of the same `submitted_by` do.
        The same key with the same body within 24 h gives the first result with `replayed`, and is looked at first.
        """
        ...

    async def first_reply(self, key: IdempotencyKey) -> Submitted | None:
        """What a `submit` with this key returned within 24 h, `replayed`. Raises `IdempotencyMismatch`."""
        ...

    async def claim(self, *, backend: str, pools: Collection[str], prompt_id: str, now: int) -> Claimed | None:
        """Take the next queued workflow of these pools that has no open attempt and for which the backend is not
        `unfit`; store the attempt as POSTED.

        The workflow stays queued, with `backend`, `prompt_id` and `attempt` set. None: nothing waits, or paused.
        """
        ...

    async def start(self, prompt_id: str, start_time: int) -> Workflow | None:
        """ComfyUI began: the attempt is RUNNING, a queued workflow running, with workflow:started.

        None when the workflow is final by now (the attempt still moves), or this was known before.
        """
        ...

    async def finish(self, prompt_id: str, outcome: Outcome) -> Workflow | None:
        """The attempt ENDED: the workflow takes the outcome, its outputs and its event, if it is still live.

        A start nobody saw is written first; `outcome.start_time` is ComfyUI's word and stands. None when the
        workflow was final already or the attempt no longer open.
        """
        ...

    async def lose(
        self,
        prompt_id: str,
        *,
        error: str,
        error_type: ErrorType,
        now: int,
        retry: bool,
        died: bool = False,
        cost: Cost | None = None,
    ) -> Workflow | None:
        """The attempt is LOST: with `retry` the workflow waits again at its old rank (workflow:error with willRetry,
        workflow:queued), without it fails. None when the workflow was final already or the attempt not open.

        `died`: its ComfyUI died while it was seen executing. The second such death (`POISON_DEATHS`) fails the
        workflow as `poison`, whatever `retry` says. `cost` is what the attempt took.
        """
        ...

    async def withdraw(self, prompt_id: str, now: int) -> Workflow | None:
        """A POSTED attempt was taken back before it started: WITHDRAWN, no attempt is charged, no event."""
        ...

    async def cancel(self, workflow_id: str, now: int, cost: Cost | None = None) -> Workflow:
        """The verdict `cancelled`, before anything is asked of ComfyUI. Already cancelled: the record as it is.

        Open attempts stay open until somebody has made sure that they are gone (`close_attempt`). `cost` is what the
        one that runs took so far; what ComfyUI does until it lets go is not counted.
        Raises `NotFound`, and `Conflict` for what completed or failed.
        """
        ...

    async def close_attempt(self, prompt_id: str, now: int) -> None:
        """The prompt of a final workflow is gone from ComfyUI: the attempt ENDED, no event."""
        ...

    async def set_priority(self, workflow_id: str, priority: Priority) -> Workflow:
        """Move a waiting workflow to another class. Raises `NotFound`, `Conflict` when it waits no more."""
        ...

    # ---- reading

    async def get(self, workflow_id: str) -> Workflow:
        """Raises `NotFound`."""
        ...

    async def graph(self, workflow_id: str) -> tuple[bytes, bytes | None]:
        """The graph and extra_data as JSON text. Raises `NotFound`."""
        ...

    async def made_from(self, workflow_id: str) -> MadeFrom | None:
        """The template that it was made from, with the values; None: from none, or there is no such workflow."""
        ...

    async def list(self, wanted: Filter) -> Page:
        """Newest first; the cursor is stable under inserts. Raises `InvalidRequest` for a cursor that is none."""
        ...

    async def attempts(self, workflow_id: str) -> Sequence[Attempt]:
        """All of them, oldest first, withdrawn ones too."""
        ...

    async def open_attempts(self, backend: str | None = None) -> Sequence[Claimed]:
        """What a restart has to reconcile, oldest first, those of cancelled workflows too."""
        ...

    async def snapshot(self, workflow_ids: Collection[str] | None) -> Snapshot:
        """The named workflows (unknown ids are left out), or with None the running ones."""
        ...

    def position(self, workflow_id: str) -> int | None:
        """How many wait for the same pool and would start before it; None when it does not wait. From memory."""
        ...

    def ahead(self, gpu: str, rank: int) -> int:
        """How many wait for this pool and would start before a workflow that came now with this rank. From memory."""
        ...

    def next_in_line(self, pools: Collection[str], backend: str) -> tuple[int, int] | None:
        """(rank, number) of what `claim` would take, or None. From memory."""
        ...

    def first_in_line(self, limit: int) -> Sequence[Entry]:
        """What waits, in the order of the queue, up to so many; those with an open attempt too. From memory."""
        ...

    def counts(self) -> QueueCounts:
        """From memory, never blocks."""
        ...

    # ---- the log (read through `EventLog`)

    async def append(self, event: StoredEvent, *, patient: bool = False) -> None:
        """Store an event that changes no workflow (backend:*, images:generated).

        A `patient` one may wait some milliseconds to share a commit with another write.
        """
        ...

    # ---- the times of nodes

    async def graphs(self, workflow_ids: Collection[str]) -> dict[str, bytes]:
        """JSON text by workflow; unknown ids are left out."""
        ...

    async def keep_times(
        self, prompt_id: str, times: Sequence[NodeTime], learnt: Sequence[NodeDuration], dropped: Sequence[Kind]
    ) -> None:
        """The nodes of an attempt, what was learnt from them, and what is known no more. Waits for a neighbour."""
        ...

    async def node_times(self, workflow_id: str) -> Sequence[NodeTime]:
        """Those of its attempt in hand, or of the last one; empty when there are none."""
        ...

    async def durations(self) -> Sequence[NodeDuration]:
        """All that was learnt, the newest at the end."""
        ...

    # ---- outputs

    async def owners(self, backend: str | None, paths: Collection[str]) -> dict[str, OutputOwner]:
        """Who reported these files last; a path is `subfolder/filename` below an output folder."""
        ...

    async def output_paths(self, workflow_id: str) -> Sequence[str]:
        """Paths of the files of type output that a workflow reported."""
        ...

    # ---- the house itself

    async def set_paused(self, paused: bool) -> None:
        """Stop or resume handing out work; survives a restart."""
        ...

    async def drained(self) -> frozenset[str]:
        """The names of the backends that are to get no work."""
        ...

    async def set_drained(self, backend: str, drained: bool) -> None:
        """Give a backend no more work, or work again; survives a restart."""
        ...

    async def client_id(self, backend: str) -> str:
        """The id this data folder uses towards a backend, made once and kept (DESIGN 2)."""
        ...

    async def backup(self, target: Path) -> None:
        """A consistent copy while everything goes on. Raises `Conflict` when the target exists."""
        ...

    async def open(self, listener: CommitListener) -> None:
        """Open or create; rebuild what lives in memory. Raises `StoreUnavailable`, worded for the operator."""
        ...

    async def close(self) -> None:
        """Write what is waiting, then close. Calls after this raise `StoreUnavailable`."""
        ...
