"""Running again, by hand, what failed or was cancelled: one workflow, or all that a filter names (CONTRACT 4).

What is final stays final: each is run again as a new workflow with `retryOf`. The id of the first retry follows from
the id of the workflow, so the store itself refuses a second first one: a replay may be repeated, cut off in the
middle, or asked for twice at once. Must never run by itself: what is poison, or failed too often, waits for a person.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import AsyncGenerator

from msgspec import Struct

from managers.errors import Conflict, InvalidRequest, NotFound, Unavailable
from managers.events.types import ErrorType
from managers.workflows.manager import Submission, WorkflowManager
from managers.workflows.model import Filter, Status, Submitted, Workflow

_RETRIES = uuid.UUID("5b0a3c5e-7f0d-4c58-9b1e-2f1a6d1f7e42")
_PAGE = 1000


def retry_id(workflow_id: str) -> str:
    """The id of its first retry."""
    return str(uuid.uuid5(_RETRIES, workflow_id))


async def retry(
    workflows: WorkflowManager,
    workflow_id: str,
    *,
    submitted_by: str | None = None,
    max_queued: int | None = None,
    once: bool = False,
) -> Submitted:
    """The same again as a new workflow, of the key that asks for it.

    Raises what `submit` does, `NotFound`, and `Conflict` unless it failed or was cancelled; with `once` also when it
    was retried before.
    """
    old = await workflows.store.get(workflow_id)
    if old.status not in (Status.FAILED, Status.CANCELLED):
        raise Conflict(f"Workflow {workflow_id} is {old.status} and cannot be retried", old.status)
    graph, extra_data = await workflows.store.graph(workflow_id)
    made_from = await workflows.store.made_from(workflow_id)

    def again(new_id: str | None) -> Submission:
        return Submission(
            id=new_id,
            graph=graph,
            extra_data=extra_data,
            priority=old.priority,
            gpu=old.gpu,
            metadata=old.metadata,
            max_attempts=old.max_attempts,
            timeout_seconds=old.timeout_seconds,
            submitted_by=submitted_by,
            max_queued=max_queued,
            webhook_url=old.webhook_url,
            made_from=made_from,
            unfit=() if made_from is None else old.unfit,
        )

    try:
        return await workflows.submit(again(retry_id(workflow_id)), retry_of=workflow_id)
    except Conflict:
        if once:
            raise
    return await workflows.submit(again(None), retry_of=workflow_id)


class Replay(Struct, frozen=True, kw_only=True):
    """Which workflows to run again: those of a list with the same filter, the oldest `limit` of them, in their order.

    `status` is failed or cancelled, `since` and `until` are epoch ms of submission. `again`: also those that were
    retried before.
    """

    status: Status = Status.FAILED
    error_type: ErrorType | None = None
    gpu: str | None = None
    submitted_by: str | None = None
    since: int | None = None
    until: int | None = None
    limit: int = 100
    again: bool = False


class Replayed(Struct, frozen=True, kw_only=True, rename="camel"):
    """One that runs again. `status` is failed where the graph cannot run anywhere today either."""

    workflow_id: str
    retry_of: str
    status: Status


class NotReplayed(Struct, frozen=True, kw_only=True, rename="camel"):
    """One that could not even be handed in, as one for a backend that is configured no more."""

    workflow_id: str
    message: str


class ReplayReport(Struct, frozen=True, kw_only=True, rename="camel"):
    """What a replay did, oldest first.

    `skipped` were retried before. `remaining` also match and are not retried yet: the replay ended at its limit, or
    before it for the reason that `stopped` gives. The next one goes on there.
    """

    count: int
    workflows: tuple[Replayed, ...]
    refused: tuple[NotReplayed, ...]
    skipped: int
    remaining: int
    stopped: str | None


async def replay(
    workflows: WorkflowManager, wanted: Replay, *, submitted_by: str | None = None, max_queued: int | None = None
) -> ReplayReport:
    """Hand them in again, one after the other, until `limit` were taken, or refused.

    Raises `Unavailable` (the queue or the share is full, the service stops, …) when not even the first was taken.
    """
    chosen: deque[str] = deque(maxlen=2 * wanted.limit)
    matching = skipped = 0
    async for workflow, retried in _matching(workflows, wanted):
        if retried and not wanted.again:
            skipped += 1
        else:
            matching += 1
            chosen.appendleft(workflow.id)
    done: list[Replayed] = []
    refused: list[NotReplayed] = []
    stopped: str | None = None
    for workflow_id in chosen:
        if len(done) == wanted.limit:
            break
        if len(refused) == wanted.limit:
            stopped = "As many as the limit were refused: leave them out by gpu or since"
            break
        try:
            submitted = await retry(
                workflows, workflow_id, submitted_by=submitted_by, max_queued=max_queued, once=not wanted.again
            )
        except Conflict:  # somebody else was quicker
            skipped += 1
        except NotFound:  # forgotten meanwhile
            pass
        except InvalidRequest as error:
            refused.append(NotReplayed(workflow_id=workflow_id, message=str(error)))
        except Unavailable as error:
            if not done:
                raise
            stopped = str(error)
            break
        else:
            done.append(
                Replayed(workflow_id=submitted.workflow.id, retry_of=workflow_id, status=submitted.workflow.status)
            )
        matching -= 1
    return ReplayReport(
        count=len(done),
        workflows=tuple(done),
        refused=tuple(refused),
        skipped=skipped,
        remaining=matching,
        stopped=stopped,
    )


async def _matching(workflows: WorkflowManager, wanted: Replay) -> AsyncGenerator[tuple[Workflow, bool], None]:
    """Those that the filter names, newest first, and whether each was retried before."""
    store, cursor = workflows.store, None
    while True:
        page = await store.list(
            Filter(
                status=wanted.status,
                gpu=wanted.gpu,
                error_type=wanted.error_type,
                submitted_by=wanted.submitted_by,
                since=wanted.since,
                limit=_PAGE,
                cursor=cursor,
            )
        )
        found = [one for one in page.workflows if wanted.until is None or one.created_at <= wanted.until]
        retries = await store.snapshot([retry_id(one.id) for one in found])
        retried = {one.retry_of for one in retries.workflows}
        for one in found:
            yield one, one.id in retried
        if page.next_cursor is None:
            return
        cursor = page.next_cursor
