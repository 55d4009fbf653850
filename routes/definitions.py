"""The stream in definitions for other languages: a JSON Schema of every frame, made from the Structs themselves.

Must never be written by hand: what a Struct says is what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from litestar import get
from msgspec import UNSET

from managers.events.packets import PreviewText
from managers.events.session import Answer, Subscribed
from managers.events.subscriptions import Ping, Subscribe, Unsubscribe
from managers.events.types import ComfyUIMessage, Event, NodeCounts
from managers.workflows.views import AttemptView, WorkflowView
from routes.problems import documented

_REF = "#/$defs/{name}"
CLIENT_FRAMES: tuple[type[msgspec.Struct], ...] = (Ping, Subscribe, Unsubscribe)


def _leaves(root: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """The classes that are sent: those nobody inherits from."""
    below = root.__subclasses__()
    if not below:
        yield root
    for one in below:
        yield from _leaves(one)


def server_frames() -> tuple[type[msgspec.Struct], ...]:
    """Every JSON frame that the stream may send, events first."""
    return (*_leaves(Event), ComfyUIMessage, PreviewText, *_leaves(Answer))


def _always_there(one: type[msgspec.Struct]) -> list[str]:
    """The fields of a frame that we send: all but those that may be unset."""
    return [field.encode_name for field in msgspec.structs.fields(one) if field.default is not UNSET]


def events_schema() -> dict[str, Any]:
    """JSON Schema 2020-12: a frame of the stream is one of `oneOf`; `$defs/ClientFrame` is what a client may send."""
    frames = server_frames()
    types = [*frames, *CLIENT_FRAMES, WorkflowView]
    references, definitions = msgspec.json.schema_components(types, ref_template=_REF)
    workflow = references[-1]
    definitions[Subscribed.__name__]["properties"]["snapshot"] = {"type": "array", "items": workflow}
    definitions[ComfyUIMessage.__name__]["properties"]["type"] = {"type": "string", "pattern": "^comfyui:"}
    views: tuple[type[msgspec.Struct], ...] = (WorkflowView, AttemptView, NodeCounts)
    for one in (*frames, *views):
        tagged = ["type"] if one.__struct_config__.tag else []
        definitions[one.__name__]["required"] = tagged + _always_there(one)
    definitions["ClientFrame"] = {"oneOf": list(references[len(frames) : -1])}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Frame",
        "description": "What GET /v1/comfyui/stream sends as text.",
        "oneOf": list(references[: len(frames)]),
        "$defs": dict(sorted(definitions.items())),
    }


@get(
    "/v1/comfyui/events/schema.json",
    summary="The frames of the stream as JSON Schema",
    description="Every frame that the WebSocket sends or takes, made from the service's own types.",
    tags=["stream"],
    opt=documented(reply={"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Frame", "oneOf": []}),
)
async def get_events_schema() -> dict[str, Any]:
    """For generators of clients."""
    return events_schema()


definition_routes = [get_events_schema]
