"""Webhooks over HTTP: endpoints, their secrets, a test call. No rule lives here."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from msgspec import UNSET, Meta, Struct, UnsetType

from managers.delivery.endpoints import (
    ALL_OF_WORKFLOWS,
    PATTERNS,
    Change,
    EndpointMade,
    EndpointView,
    SecretView,
    Tried,
    Webhooks,
)
from managers.guard import MAX_URL
from routes.bodies import read_json
from routes.ids import known
from routes.problems import documented, problems

PATH = "/v1/webhooks"

Url = Annotated[str, Meta(min_length=1, max_length=MAX_URL)]
Pattern = Annotated[str, Meta(extra_json_schema={"enum": list(PATTERNS)})]
Patterns = Annotated[tuple[Pattern, ...], Meta(min_length=1, max_length=50)]
Description = Annotated[str, Meta(max_length=500)]


class WebhookRequest(Struct, frozen=True, kw_only=True, rename="camel"):
    """What POST /v1/webhooks takes. `events` are types; `workflow:*` stands for all that begin so, `*` for all."""

    url: Url
    events: Patterns = ALL_OF_WORKFLOWS
    description: Description | None = None


class WebhookChange(Struct, frozen=True, kw_only=True, rename="camel"):
    """What PATCH takes: what is left out stays."""

    url: Url | UnsetType = UNSET
    events: Patterns | UnsetType = UNSET
    description: Description | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class WebhooksReply(Struct, frozen=True, rename="camel"):
    """All endpoints, oldest first."""

    webhooks: tuple[EndpointView, ...]


_create = msgspec.json.Decoder(WebhookRequest)
_change = msgspec.json.Decoder(WebhookChange)

_EXAMPLE = {
    "id": "019aad3b-0f5a-7b3e-8c44-5d6e7f8091a2",
    "url": "https://shop.example/hooks/comfyui",
    "events": ["workflow:*"],
    "description": "orders",
    "enabled": True,
    "disabledReason": None,
    "createdAt": 1795349867341,
}
_MADE = _EXAMPLE | {"secret": "whsec_EXAMPLEexampleEXAMPLEexampleEXAMPLEexampleEX="}


@post(
    PATH,
    summary="Make a webhook",
    description=(
        "From now on every stored event that `events` names is sent to `url` (Standard Webhooks). The reply shows "
        "the `secret`, which nobody can show again. An address in a private network is refused."
    ),
    tags=["delivery"],
    status_code=201,
    responses=problems(409, 415),
    opt=documented(
        body=WebhookRequest,
        request={"url": "https://shop.example/hooks/comfyui", "events": ["workflow:*"], "description": "orders"},
        reply=_MADE,
    ),
)
async def create_webhook(request: Request[Any, Any, Any], webhooks: NamedDependency[Webhooks]) -> EndpointMade:
    """A new one."""
    body = await read_json(request, _create)
    return await webhooks.create(body.url, body.events, body.description)


@get(
    PATH,
    summary="List the webhooks",
    description="Oldest first, without their secrets.",
    tags=["delivery"],
    opt=documented(reply={"webhooks": [_EXAMPLE]}),
)
async def list_webhooks(webhooks: NamedDependency[Webhooks]) -> WebhooksReply:
    """All of them."""
    return WebhooksReply(webhooks.list())


@get(
    PATH + "/{webhook_id:str}",
    summary="Look at a webhook",
    description="`disabledReason` says why it is not enabled, when nobody asked for that: it answered 410.",
    tags=["delivery"],
    responses=problems(404),
    opt=documented(reply=_EXAMPLE),
)
async def get_webhook(webhooks: NamedDependency[Webhooks], webhook_id: FromPath[str]) -> EndpointView:
    """One of them."""
    return webhooks.get(known(webhook_id, "Webhook"))


@patch(
    PATH + "/{webhook_id:str}",
    summary="Change a webhook",
    description=(
        "What is left out stays. A new `url` also gets what is to be tried again. While `enabled` is false it hears "
        "nothing, and what was pending is dead (and can be replayed)."
    ),
    tags=["delivery"],
    responses=problems(404, 415),
    opt=documented(body=WebhookChange, request={"events": ["workflow:completed"]}, reply=_EXAMPLE),
)
async def change_webhook(
    request: Request[Any, Any, Any], webhooks: NamedDependency[Webhooks], webhook_id: FromPath[str]
) -> EndpointView:
    """Another address, other events, on or off."""
    body = await read_json(request, _change)
    change = Change(url=body.url, events=body.events, description=body.description, enabled=body.enabled)
    return await webhooks.change(known(webhook_id, "Webhook"), change)


@delete(
    PATH + "/{webhook_id:str}",
    summary="Delete a webhook",
    description="It hears no more; what was pending is dead. Its deliveries stay in the log.",
    tags=["delivery"],
    status_code=204,
    responses=problems(404),
)
async def delete_webhook(webhooks: NamedDependency[Webhooks], webhook_id: FromPath[str]) -> None:
    """No more."""
    await webhooks.delete(known(webhook_id, "Webhook"))


@post(
    PATH + "/{webhook_id:str}/rotate",
    summary="Exchange the secret of a webhook",
    description="The reply shows the new one, once. For 24 hours calls carry two signatures, one of each.",
    tags=["delivery"],
    status_code=200,
    responses=problems(404),
    opt=documented(reply=_MADE),
)
async def rotate_webhook(webhooks: NamedDependency[Webhooks], webhook_id: FromPath[str]) -> EndpointMade:
    """Another secret."""
    return await webhooks.rotate(known(webhook_id, "Webhook"))


@post(
    PATH + "/{webhook_id:str}/test",
    summary="Call a webhook now",
    description="One signed call of type `webhook:test`, and what came of it; it is not tried again.",
    tags=["delivery"],
    status_code=200,
    responses=problems(404),
    opt=documented(reply={"delivered": False, "status": 500, "error": "It answered 500"}),
)
async def test_webhook(webhooks: NamedDependency[Webhooks], webhook_id: FromPath[str]) -> Tried:
    """Try it."""
    return await webhooks.test(known(webhook_id, "Webhook"))


@get(
    PATH + "/secret",
    summary="The secret of calls about single workflows",
    description="What calls to the `webhookUrl` of a workflow are signed with; one for the whole service.",
    tags=["delivery"],
    opt=documented(reply={"secret": _MADE["secret"], "previousUntil": None}),
)
async def shared_secret(webhooks: NamedDependency[Webhooks]) -> SecretView:
    """What signs."""
    return await webhooks.shared_secret()


@post(
    PATH + "/secret/rotate",
    summary="Exchange the secret of calls about single workflows",
    description="For 24 hours, until `previousUntil`, calls carry two signatures, one of each.",
    tags=["delivery"],
    status_code=200,
    opt=documented(reply={"secret": _MADE["secret"], "previousUntil": 1795436267341}),
)
async def rotate_shared_secret(webhooks: NamedDependency[Webhooks]) -> SecretView:
    """Another secret."""
    return await webhooks.rotate_shared_secret()


webhook_routes = [
    create_webhook,
    list_webhooks,
    get_webhook,
    change_webhook,
    delete_webhook,
    rotate_webhook,
    test_webhook,
    shared_secret,
    rotate_shared_secret,
]
