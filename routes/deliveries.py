"""What left the house, what waits to, and what never did: the delivery log, and replay. No rule lives here.

Must never take a filter of a bulk replay in part: a name it does not know would make it wider than what was meant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter
from msgspec import Struct

from managers.delivery.office import Deliveries, DeliveryDetail, DeliveryPage, DeliveryView
from managers.delivery.store import Filter, State
from managers.errors import InvalidRequest
from managers.events.types import Finding
from routes.ids import known
from routes.problems import documented, problems

PATH = "/v1/deliveries"
_FILTERS = frozenset({"state", "destination", "workflowId"})

_WORKFLOW = "3f0c6f1e-4d3b-4d55-9f6a-0d6f2a3c9b11"
_EXAMPLE = {
    "id": "019aad3c-6b7e-7c11-9d52-1f6a2b3c4d5e",
    "destination": "webhook:019aad3b-0f5a-7b3e-8c44-5d6e7f8091a2",
    "kind": "webhook",
    "type": "workflow:completed",
    "workflowId": _WORKFLOW,
    "seq": 42,
    "state": "pending",
    "attempts": 2,
    "nextAttemptAt": 1795350167341,
    "lastError": "It answered 500",
    "lastStatus": 500,
    "createdAt": 1795349867341,
    "deliveredAt": None,
}
_EXAMPLE_EVENT = {
    "type": "workflow:completed",
    "timestamp": 1795349867340,
    "workflowId": _WORKFLOW,
    "seq": 42,
    "duration": 4.181,
    "outputs": [],
    "outputsReused": False,
}


class RetriedReply(Struct, frozen=True):
    """How many are pending again."""

    retried: int


@get(
    PATH,
    summary="List deliveries",
    description=(
        "Newest first: what each destination (a webhook, S3, EventBridge) is to hear, and what became of it. "
        "Delivered ones are kept for `DELIVERY_LOG_DAYS`, dead ones as long as their event."
    ),
    tags=["delivery"],
    opt=documented(reply={"deliveries": [_EXAMPLE], "nextCursor": None}),
)
async def list_deliveries(
    deliveries: NamedDependency[Deliveries],
    in_state: Annotated[State | None, QueryParameter(name="state", description="Only these.")] = None,
    destination: Annotated[str | None, QueryParameter(description="Only those to this one.")] = None,
    workflow_id: Annotated[
        str | None, QueryParameter(name="workflowId", description="Only those about this workflow.")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="How many at most.")] = 50,
    cursor: Annotated[str | None, QueryParameter(description="`nextCursor` of the page before.")] = None,
) -> DeliveryPage:
    """A page of them."""
    return await deliveries.list(
        Filter(state=in_state, destination=destination, workflow_id=workflow_id, limit=limit, cursor=cursor)
    )


@get(
    PATH + "/{delivery_id:str}",
    summary="Look at a delivery",
    description="With the event that it carries (`body`), as it was stored.",
    tags=["delivery"],
    responses=problems(404),
    opt=documented(reply=_EXAMPLE | {"body": _EXAMPLE_EVENT}),
)
async def get_delivery(deliveries: NamedDependency[Deliveries], delivery_id: FromPath[str]) -> DeliveryDetail:
    """One of them."""
    return await deliveries.get(known(delivery_id, "Delivery"))


@post(
    PATH + "/{delivery_id:str}/retry",
    summary="Deliver again",
    description=(
        "Now, and with all its tries, whatever became of it before. The id stays: a receiver that had it can tell. "
        "One that is pending does not wait for its time any more. 409: its destination is there no more."
    ),
    tags=["delivery"],
    status_code=202,
    responses=problems(404, 409),
    opt=documented(reply=_EXAMPLE | {"attempts": 0, "nextAttemptAt": 1795436267000}),
)
async def retry_delivery(deliveries: NamedDependency[Deliveries], delivery_id: FromPath[str]) -> DeliveryView:
    """Once more."""
    return await deliveries.retry(known(delivery_id, "Delivery"))


@post(
    PATH + "/retry",
    summary="Deliver again all that is dead",
    description=(
        "The filter is that of the list, in the query: look there first at what it names. Those of destinations that "
        "are there no more are left out."
    ),
    tags=["delivery"],
    status_code=202,
    opt=documented(reply={"retried": 12}),
)
async def retry_deliveries(
    request: Request[Any, Any, Any],
    deliveries: NamedDependency[Deliveries],
    in_state: Annotated[  # noqa: ARG001 - there is only one
        Literal["dead"], QueryParameter(name="state", description="What became of them.")
    ] = "dead",
    destination: Annotated[str | None, QueryParameter(description="Only those to this one.")] = None,
    workflow_id: Annotated[
        str | None, QueryParameter(name="workflowId", description="Only those about this workflow.")
    ] = None,
) -> RetriedReply:
    """All of them once more."""
    if await request.body():
        raise InvalidRequest("The filter belongs into the query, this takes no body")
    unknown = sorted(set(request.query_params) - _FILTERS)
    if unknown:
        message = f"There is no filter {unknown[0][:64]!r}; known: {', '.join(sorted(_FILTERS))}"
        raise InvalidRequest(message, [Finding(code="invalid_query", message=message, allowed=sorted(_FILTERS))])
    return RetriedReply(await deliveries.retry_dead(destination, workflow_id))


delivery_routes = [list_deliveries, get_delivery, retry_delivery, retry_deliveries]
