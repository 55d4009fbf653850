"""The description of the API (OpenAPI 3.1) and the page that shows it, all served by us (CONTRACT 3).

Litestar writes the first draft from the routes; here it gets what it cannot know: which paths are open, the error
replies every operation has, the examples of `documented`. Must never load anything from another host.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from litestar import Litestar, MediaType, Request, Response, Router
from litestar.datastructures import CacheControlHeader
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, License, SecurityScheme, Tag
from litestar.routes import HTTPRoute
from litestar.static_files import create_static_files_router
from litestar.types import Method

from management_api.security import is_limited, is_open, needed_scope
from routes.problems import PROBLEM_JSON, Problem, describe_problem, example_problem

STATIC = Path(__file__).parent / "static"
TITLE = "ComfyUI Management API"
DESCRIPTION = """A durable priority queue with REST, live events and metrics in front of ComfyUI.

Send the key as `X-API-Key: <key>` or `Authorization: Bearer <key>` (the *Authorize* button). Each operation names the
scope the key needs for it. Errors are problem details (RFC 9457). Times are epoch milliseconds unless they say
otherwise."""

_ANY_KEY = "MANAGEMENT_API_KEY, or a named key that has the scope"

# Swagger UI needs neither inline scripts nor inline styles (looked at in Chromium, every operation open and tried).
_PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<link rel="icon" type="image/png" href="/docs/static/favicon-32x32.png">
<link rel="stylesheet" href="/docs/static/swagger-ui.css">
<script nonce="{{nonce}}" src="/docs/static/swagger-ui-bundle.js" defer></script>
<script nonce="{{nonce}}" src="/docs/static/docs.js" defer></script>
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript. The description itself is at <a href="/docs/json">/docs/json</a>.</noscript>
</body>
</html>
"""


class _Page(OpenAPIRenderPlugin):
    """The page; its nonce is filled in by `_finish_reply`."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        """The same page for everybody."""
        return _PAGE.encode()


class Living(Protocol):
    """Operations that come and go while the service runs."""

    def mark(self) -> Hashable:
        """Another one when they are others."""
        ...

    def paths(self, finished: Mapping[str, Any]) -> Mapping[str, Any]:
        """What they add to the paths of the finished description."""
        ...


class _Description(OpenAPIRenderPlugin):
    """The description in one encoding, kept until its operations are others: YAML of a large one takes its time."""

    def __init__(
        self, path: list[str], media_type: MediaType, encode: Callable[[Any], bytes], splice: Callable[..., bytes]
    ) -> None:
        super().__init__(path=path, media_type=media_type)
        self._encode = encode
        self._splice = splice
        self._finished: dict[str, Any] = {}
        self._mark: Hashable = None
        self._base: bytes | None = None
        self._made = b""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The bytes that `prepare` made, with the operations there are now."""
        if self._base is None:
            self.make(finish(request.app, openapi_schema))
        living: Living | None = request.app.state.get("living")
        if living is not None and (mark := living.mark()) != self._mark:
            self._made = self._splice(self._base, living.paths(self._finished))
            self._mark = mark
        return self._made

    def make(self, finished: dict[str, Any]) -> None:
        """Encode the finished description and keep it."""
        self._finished, self._mark = finished, None
        self._base = self._made = self._encode(finished)


def _splice_json(base: bytes, paths: Mapping[str, Any]) -> bytes:
    """The description with these paths, without encoding the others again."""
    more = msgspec.json.encode(paths)[1:-1]
    return base.replace(b'"paths":{', b'"paths":{' + more + b",", 1) if more else base


def _splice_yaml(base: bytes, paths: Mapping[str, Any]) -> bytes:
    """The same."""
    lines = msgspec.yaml.encode(paths).splitlines(keepends=True) if paths else []
    return base.replace(b"\npaths:\n", b"\npaths:\n" + b"".join(b"  " + line for line in lines), 1)


def _finish_reply(response: Response[Any]) -> Response[Any]:
    """Litestar's own HTML page for unknown paths becomes a problem like any other; pages get nonce and policy."""
    if response.status_code == 404:
        raise NotFoundException
    if response.media_type == MediaType.HTML:
        nonce = secrets.token_urlsafe(16)
        response.content = response.content.replace(b"{nonce}", nonce.encode())
        response.headers["content-security-policy"] = _PAGE_POLICY.format(nonce=nonce)
        response.headers["cache-control"] = "no-store"
    return response


def _operation_id(handler: HTTPRouteHandler, method: Method, _: list[Any]) -> str:
    """`submit_workflow` is submitWorkflow: what generated clients call it."""
    first, *rest = handler.handler_name.split("_")
    return first + "".join(word.capitalize() for word in rest) + ("Head" if method == "HEAD" else "")


def openapi_config(version: str) -> OpenAPIConfig:
    """For `Litestar(openapi_config=)`."""
    return OpenAPIConfig(
        title=TITLE,
        version=version,
        description=DESCRIPTION,
        license=License(name="MIT", identifier="MIT"),
        security=[{"apiKey": []}, {"bearer": []}],
        components=Components(
            security_schemes={
                "apiKey": SecurityScheme(
                    type="apiKey", name="X-API-Key", security_scheme_in="header", description=_ANY_KEY
                ),
                "bearer": SecurityScheme(type="http", scheme="bearer", description=_ANY_KEY),
            }
        ),
        tags=[
            Tag(name="service", description="What this is."),
            Tag(name="workflows", description="Submit, follow, cancel, retry."),
            Tag(name="generate", description="Parameters in, pictures out."),
            Tag(name="templates", description="Graphs with typed parameters."),
            Tag(name="stream", description="Live events."),
            Tag(name="files", description="Models and outputs."),
            Tag(name="queue", description="The queue as a whole."),
            Tag(name="delivery", description="What others are told: webhooks, and the log of deliveries."),
            Tag(name="tasks", description="Programs that providers run."),
            Tag(name="monitoring", description="Health, readiness, metrics."),
        ],
        operation_id_creator=_operation_id,
        openapi_router=Router(
            "/docs", route_handlers=[], include_in_schema=False, before_request=_prepared, after_request=_finish_reply
        ),
        render_plugins=[
            _Page(path="/", media_type=MediaType.HTML),
            _Description(["/json", "/openapi.json"], MediaType.JSON, msgspec.json.encode, _splice_json),
            _Description(["/yaml", "/openapi.yaml"], MediaType.TEXT, msgspec.yaml.encode, _splice_yaml),
        ],
    )


def static_router() -> Router:
    """The files of the documentation page."""
    return create_static_files_router(
        path="/docs/static",
        directories=[STATIC / "swagger"],
        include_in_schema=False,
        cache_control=CacheControlHeader(public=True, max_age=86400),
    )


async def _prepared(request: Request[Any, Any, Any]) -> None:
    """Make the descriptions when the first one asks: half a second of computing that a start need not wait for, nor
    the event loop.
    """
    state = request.app.state
    making: asyncio.Future[None] | None = state.get("descriptions")
    if making is None:
        making = state["descriptions"] = asyncio.ensure_future(asyncio.to_thread(_prepare, request.app))
    await asyncio.shield(making)


def _prepare(app: Litestar) -> None:
    config = app.openapi_config
    finished = finish(app, app.openapi_schema.to_schema())
    for plugin in config.render_plugins if config else ():
        if isinstance(plugin, _Description):
            plugin.make(finished)


# ---- finishing the draft


def finish(app: Litestar, draft: dict[str, Any]) -> dict[str, Any]:
    """The draft with error replies, examples, bodies and the open paths. Changes nothing of what it was given."""
    schema: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(draft))
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    components.update(_struct_schema(Problem)[1])
    for path, method, handler in _handlers(app):
        operation = schema.get("paths", {}).get(path, {}).get(method.lower())
        if operation is not None:
            _document(operation, handler, components)
            _add_errors(operation, path, method)
    used = {
        tag for item in schema["paths"].values() for operation in item.values() for tag in operation.get("tags", ())
    }
    schema["tags"] = [tag for tag in schema.get("tags", ()) if tag["name"] in used]
    return schema


def _handlers(app: Litestar) -> Iterator[tuple[str, str, HTTPRouteHandler]]:
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                for method in handler.http_methods:
                    yield route.path_format or "/", str(method), handler


def _document(operation: dict[str, Any], handler: HTTPRouteHandler, components: dict[str, Any]) -> None:
    told = handler.opt.get("documented") or {}
    operation.setdefault("description", operation["summary"])
    if told.get("body") is not None:
        reference, found = _struct_schema(told["body"])
        components.update(found)
        content = {"application/json": {"schema": reference}}
        operation.setdefault("requestBody", {"required": not told["optional"], "content": content})
    if told.get("request") is not None:
        for media in operation.get("requestBody", {}).get("content", {}).values():
            media["example"] = told["request"]
    if told.get("reply") is not None:
        reply = operation["responses"].setdefault(str(handler.status_code), {"description": "Done."})
        for media in reply.setdefault("content", {}).values() or [
            reply["content"].setdefault("application/json", {})
        ]:
            media["example"] = told["reply"]
        for kind, example in told["also"].items():
            reply["content"][kind] = {"schema": {"type": "string"}, "example": example}
    for status in told.get("pictures", ()):
        operation["responses"][str(status)]["content"]["image/*"] = {"schema": {"type": "string", "format": "binary"}}


_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}
}
_HEADERS: dict[str, dict[str, Any]] = {
    "403": {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "pattern": "^Bearer error="}}},
    "401": {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    "429": _RETRY_AFTER,
    "503": _RETRY_AFTER,
}


def _add_errors(operation: dict[str, Any], path: str, method: str) -> None:
    replies: dict[str, Any] = operation.setdefault("responses", {})
    wanted = {500}
    if operation.get("parameters") or "requestBody" in operation:
        wanted.add(400)
    if "requestBody" in operation:
        wanted.add(413)
    if is_open(path):
        operation["security"] = []
    else:
        wanted |= {401, 403, 503}
        scope = needed_scope(method, path)
        operation["security"] = [{scheme: [scope]} for scheme in ("apiKey", "bearer")]
        operation["description"] += f"\n\nNeeds a key with the scope `{scope}`."
    if is_limited(method, path):
        wanted.add(429)
    for status in wanted:
        if PROBLEM_JSON not in replies.get(str(status), {}).get("content", {}):
            replies[str(status)] = {
                "description": describe_problem(status),
                "content": {
                    PROBLEM_JSON: {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "example": example_problem(status, path),
                    }
                },
            }
    for code, reply in replies.items():
        media = reply.get("content", {}).get(PROBLEM_JSON)
        if media is not None and "examples" not in media:
            media.setdefault("example", example_problem(int(code), path))
        if media is not None and code in _HEADERS:
            reply["headers"] = _HEADERS[code]
    operation["responses"] = dict(sorted(replies.items()))


def _struct_schema(kind: type[msgspec.Struct]) -> tuple[dict[str, Any], dict[str, Any]]:
    (reference,), components = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    return reference, components
