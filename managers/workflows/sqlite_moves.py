"""What the embedded store can do to a workflow: every function is one operation of the writer, in one transaction.

Must never read the clock or wait for anything. `_save` is the one place where a record changes: it knows `MOVES`.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from managers.errors import Conflict, NotFound
from managers.events.types import (
    Cost,
    ErrorType,
    NodeCounts,
    StoredEvent,
    WorkflowCancelled,
    WorkflowCompleted,
    WorkflowError,
    WorkflowQueued,
    WorkflowStarted,
)
from managers.workflows import sqlite_statements as sql
from managers.workflows.model import (
    FINAL,
    MOVES,
    OPEN,
    POISON_DEATHS,
    Attempt,
    AttemptState,
    Claimed,
    Outcome,
    Priority,
    Status,
    Workflow,
    known,
    merged,
    rank,
)
from managers.workflows.sqlite_rows import (
    attempt_of,
    output_row,
    unpack_graph,
    updated,
    workflow_of,
)
from managers.workflows.sqlite_statements import ATTEMPT_WIDTH
from managers.workflows.sqlite_usage import charged
from managers.workflows.sqlite_writer import Transaction
from managers.workflows.waiting import CLASSES, Act, Entry


def claim(
    transaction: Transaction, *, backend: str, pools: Collection[str], prompt_id: str, now: int
) -> Claimed | None:
    """Store an attempt for the first that waits free in these pools."""
    entry = transaction.line.next(pools, backend)
    if entry is None:
        return None
    before = workflow_of(transaction.execute(sql.GET_WORKFLOW_BY_NUMBER, (entry.number,)).fetchone())
    after = replace(before, attempt=before.attempt + 1, backend=backend, prompt_id=prompt_id)
    attempt = Attempt(
        prompt_id=prompt_id,
        workflow_id=after.id,
        number=after.attempt,
        backend=backend,
        state=AttemptState.POSTED,
        created_at=now,
    )
    transaction.execute(
        sql.INSERT_ATTEMPT, (prompt_id, after.number, attempt.number, backend, attempt.state.value, now)
    )
    _save(transaction, before, after)
    transaction.draft.do(Act.HOLD, entry)
    graph = transaction.execute(sql.GET_GRAPH, (after.id,)).fetchone()
    return Claimed(after, attempt, *graph)


def unpacked(claimed: Claimed) -> Claimed:
    """What `claim` returned, with the graph as JSON text: for a thread that has the time."""
    graph, extra_data = unpack_graph((claimed.graph, claimed.extra_data))
    return Claimed(claimed.workflow, claimed.attempt, graph, extra_data)


def start(transaction: Transaction, prompt_id: str, start_time: int, now: int) -> Workflow | None:
    """The attempt runs, and with it the workflow."""
    found = _find(transaction, prompt_id)
    if found is None or found[0].state is not AttemptState.POSTED:
        return None
    attempt, workflow = found
    _move_attempt(transaction, attempt, AttemptState.RUNNING, start_time=start_time)
    if workflow.status is not Status.QUEUED:
        return None
    return _run(transaction, workflow, start_time, now)


def finish(transaction: Transaction, prompt_id: str, outcome: Outcome, now: int) -> Workflow | None:
    """The attempt ended, and with it the workflow."""
    if outcome.status not in FINAL:
        raise ValueError(f"An attempt cannot end as {outcome.status.value}")
    found = _find(transaction, prompt_id)
    if found is None or found[0].state not in OPEN:
        return None
    attempt, workflow = found
    _move_attempt(
        transaction,
        attempt,
        AttemptState.ENDED,
        start_time=outcome.start_time,
        end_time=outcome.completion_time,
        error=outcome.error,
        error_type=outcome.error_type,
    )
    if workflow.final:
        return None
    if workflow.status is Status.QUEUED and outcome.start_time is not None:
        workflow = _run(transaction, workflow, outcome.start_time, now)
    completed = outcome.status is Status.COMPLETED
    after = replace(
        workflow,
        status=outcome.status,
        start_time=workflow.start_time if outcome.start_time is None else outcome.start_time,
        completion_time=outcome.completion_time,
        progress=100 if completed else outcome.progress if outcome.progress is not None else workflow.progress,
        nodes=outcome.nodes or workflow.nodes,
        error=outcome.error,
        error_type=outcome.error_type,
        errors=merged(workflow.errors, outcome.errors),
        outputs=outcome.outputs,
        outputs_reused=outcome.outputs_reused,
    )
    after = charged(transaction, after, outcome.cost, end=outcome.completion_time, now=now)
    _save(transaction, workflow, after)
    transaction.insert(sql.INSERT_OUTPUTS, [output_row(after, n, output) for n, output in enumerate(outcome.outputs)])
    transaction.write(_ended(after, outcome, now), after.number)
    return after


def lose(
    transaction: Transaction,
    prompt_id: str,
    *,
    error: str,
    error_type: ErrorType,
    now: int,
    retry: bool,
    died: bool = False,
    cost: Cost | None = None,
) -> Workflow | None:
    """The attempt is lost: the workflow waits again, or has failed. It ran until now, or to its time limit."""
    found = _find(transaction, prompt_id)
    if found is None or found[0].state not in OPEN:
        return None
    attempt, workflow = found
    _move_attempt(
        transaction, attempt, AttemptState.LOST, end_time=now, error=error, error_type=error_type, died=died
    )
    if workflow.final:
        return None
    if died:
        (deaths,) = transaction.execute(sql.COUNT_DEATHS, (workflow.number,)).fetchone()
        if deaths >= POISON_DEATHS:
            error, error_type, retry = f"{deaths} times ComfyUI died while it ran this: {error}", "poison", False
    told = WorkflowError(timestamp=now, workflow_id=workflow.id, error=error, error_type=error_type, will_retry=retry)
    transaction.write(told, workflow.number)
    end = (
        now if workflow.start_time is None else min(now, workflow.start_time + round(workflow.timeout_seconds * 1000))
    )
    if not retry:
        after = replace(workflow, status=Status.FAILED, completion_time=now, error=error, error_type=error_type)
        after = charged(transaction, after, cost, end=end, now=now)
        _save(transaction, workflow, after)
        return after
    after = replace(
        charged(transaction, workflow, cost, end=end, now=now),
        status=Status.QUEUED,
        backend=None,
        prompt_id=None,
        start_time=None,
        progress=0,
        nodes=NodeCounts(total=workflow.nodes.total),
    )
    _save(transaction, workflow, after)
    position = _wait_again(transaction, workflow)
    transaction.write(queued(after, position, now), after.number)
    return after


def withdraw(transaction: Transaction, prompt_id: str, now: int) -> Workflow | None:
    """The attempt never was."""
    found = _find(transaction, prompt_id)
    if found is None or found[0].state is not AttemptState.POSTED:
        return None
    attempt, workflow = found
    _move_attempt(transaction, attempt, AttemptState.WITHDRAWN, end_time=now)
    if workflow.status is not Status.QUEUED:
        return None
    after = replace(workflow, attempt=workflow.attempt - 1, backend=None, prompt_id=None)
    _save(transaction, workflow, after)
    _wait_again(transaction, workflow)
    return after


def close_attempt(transaction: Transaction, prompt_id: str, now: int) -> None:
    """The attempt of a final workflow ended; nothing for one that still lives."""
    found = _find(transaction, prompt_id)
    if found is not None and found[0].state in OPEN and found[1].final:
        _move_attempt(transaction, found[0], AttemptState.ENDED, end_time=now)


def cancel(transaction: Transaction, workflow_id: str, now: int, cost: Cost | None = None) -> Workflow:
    """The verdict `cancelled`."""
    workflow = _get(transaction, workflow_id)
    if workflow.status is Status.CANCELLED:
        return workflow
    if workflow.final:
        raise Conflict(f"Workflow {workflow_id} is {workflow.status.value} already", workflow.status.value)
    after = replace(workflow, status=Status.CANCELLED, completion_time=now)
    after = charged(transaction, after, cost, end=now, now=now)
    _save(transaction, workflow, after)
    transaction.write(WorkflowCancelled(timestamp=now, workflow_id=workflow_id), after.number)
    return after


def set_priority(transaction: Transaction, workflow_id: str, priority: Priority, aging_seconds: float) -> Workflow:
    """Another class, and the place that goes with it."""
    workflow = _get(transaction, workflow_id)
    entry = transaction.line.get(workflow_id)
    if entry is None:
        raise Conflict(f"Workflow {workflow_id} is {workflow.status.value}, not waiting", workflow.status.value)
    place = rank(priority, workflow.created_at, aging_seconds)
    after = replace(workflow, priority=priority, rank=place)
    _save(transaction, workflow, after)
    held = transaction.line.held(entry)
    transaction.draft.leave(entry)
    enter(transaction, after)
    if held:
        transaction.draft.do(Act.HOLD, _entry(after))
    return after


# ---- the steps they share


def _get(transaction: Transaction, workflow_id: str) -> Workflow:
    row = transaction.execute(sql.GET_WORKFLOW, (workflow_id,)).fetchone()
    if row is None:
        raise NotFound(f"Workflow {workflow_id} not found")
    return workflow_of(row)


def _find(transaction: Transaction, prompt_id: str) -> tuple[Attempt, Workflow] | None:
    row = transaction.execute(sql.GET_ATTEMPT, (prompt_id,)).fetchone()
    return None if row is None else (attempt_of(row), workflow_of(row[ATTEMPT_WIDTH:]))


def _save(transaction: Transaction, before: Workflow, after: Workflow) -> None:
    """Write the record, and let the line follow. Refuses a move that `MOVES` does not list."""
    if after.status is not before.status and after.status not in MOVES[before.status]:
        raise Conflict(
            f"Workflow {before.id} cannot go from {before.status.value} to {after.status.value}", before.status.value
        )
    if transaction.execute(sql.UPDATE_WORKFLOW, updated(before, after)).rowcount != 1:
        raise Conflict(f"Workflow {before.id} is no longer {before.status.value}", before.status.value)
    if after.status is before.status:
        return
    if before.status is Status.RUNNING:
        transaction.draft.do(Act.REST)
    elif entry := transaction.line.get(before.id):
        transaction.draft.leave(entry)
    if after.status is Status.RUNNING:
        transaction.draft.do(Act.RUN)


def _run(transaction: Transaction, workflow: Workflow, start_time: int, now: int) -> Workflow:
    after = replace(workflow, status=Status.RUNNING, start_time=start_time)
    _save(transaction, workflow, after)
    event = WorkflowStarted(
        timestamp=now,
        workflow_id=after.id,
        backend=after.backend or "",
        attempt=after.attempt,
        start_time=start_time,
        created_at=after.created_at,
        priority=after.priority.value,
        gpu=after.gpu,
        started_before=_started_before(transaction, after),
    )
    transaction.write(event, after.number)
    return after


def _started_before(transaction: Transaction, workflow: Workflow) -> bool:
    """Whether an attempt before the one in hand had begun."""
    if workflow.attempt == 1:
        return False
    attempts = map(attempt_of, transaction.execute(sql.GET_ATTEMPTS, (workflow.id,)))
    return any(attempt.number < workflow.attempt and attempt.start_time is not None for attempt in attempts)


def _move_attempt(
    transaction: Transaction,
    attempt: Attempt,
    state: AttemptState,
    *,
    start_time: int | None = None,
    end_time: int | None = None,
    error: str | None = None,
    error_type: ErrorType | None = None,
    died: bool = False,
) -> None:
    start_time = attempt.start_time if start_time is None else start_time
    transaction.execute(
        sql.UPDATE_ATTEMPT,
        (state.value, start_time, end_time, error, error_type, died, attempt.prompt_id, attempt.state.value),
    )


def _entry(workflow: Workflow) -> Entry:
    level = CLASSES.index(workflow.priority)
    return Entry(
        workflow.rank,
        workflow.number,
        workflow.id,
        workflow.gpu,
        level,
        workflow.created_at,
        workflow.submitted_by,
        workflow.unfit,
    )


def enter(transaction: Transaction, workflow: Workflow) -> int:
    """Put it in the line, and tell its place."""
    entry = _entry(workflow)
    transaction.draft.do(Act.ENTER, entry)
    return transaction.line.position(entry)


def _wait_again(transaction: Transaction, before: Workflow) -> int:
    """It has no attempt any more: free it where it stands, or put it back. Tells its place."""
    entry = transaction.line.get(before.id)
    if entry is None:
        return enter(transaction, before)
    transaction.draft.do(Act.FREE, entry)
    return transaction.line.position(entry)


def queued(workflow: Workflow, position: int, now: int) -> WorkflowQueued:
    """The event that says so."""
    return WorkflowQueued(
        timestamp=now,
        workflow_id=workflow.id,
        queue_position=position,
        priority=workflow.priority.value,
        gpu=workflow.gpu,
        attempt=workflow.attempt,
    )


def _ended(workflow: Workflow, outcome: Outcome, now: int) -> StoredEvent:
    duration = None
    if workflow.start_time is not None:
        duration = max(0, outcome.completion_time - workflow.start_time) / 1000
    if outcome.status is Status.CANCELLED:
        return WorkflowCancelled(timestamp=now, workflow_id=workflow.id)
    if outcome.status is Status.COMPLETED:
        return WorkflowCompleted(
            timestamp=now,
            workflow_id=workflow.id,
            duration=duration or 0.0,
            outputs=outcome.outputs,
            outputs_reused=outcome.outputs_reused,
            errors=outcome.errors,
            backend=workflow.backend,
            gpu=workflow.gpu,
            cost=known(workflow.cost),
        )
    return WorkflowError(
        timestamp=now,
        workflow_id=workflow.id,
        error=outcome.error or "",
        error_type=outcome.error_type or "node",
        errors=outcome.errors,
        node_id=outcome.node_id,
        node_type=outcome.node_type,
        duration=duration,
    )
