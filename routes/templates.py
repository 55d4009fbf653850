"""The registry of templates over HTTP. No rule lives here: decode, call `Templates`, encode."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, PathParameter, QueryParameter
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from managers.templates.model import ALIAS, NAME, Definition, Input, Source, Version, split_reference
from managers.templates.registry import Templates
from managers.templates.schema import schema
from managers.templates.store import Statistics
from routes.access import caller_of
from routes.bodies import read_json
from routes.problems import documented, problems

PATH = "/v1/templates"

_Number = Annotated[int, Meta(ge=1, le=2**31)]


class Listed(Struct, frozen=True, kw_only=True, rename="camel"):
    """One of the list. `missing`: node classes that no ComfyUI has any more."""

    name: str
    version: int
    description: str
    aliases: dict[str, int]
    versions: int
    source: Source
    missing: tuple[str, ...]


class ListReply(Struct, frozen=True, rename="camel"):
    """All templates, by name. `broken` are files that could not be read at the start."""

    templates: list[Listed]
    broken: list[BrokenFile]


class BrokenFile(Struct, frozen=True):
    """A file that is no template."""

    file: str
    reason: str


class TemplateView(Struct, frozen=True, kw_only=True, rename="camel"):
    """One version of a template, as PUT took it."""

    name: str
    version: int
    created_at: int
    saved_by: str
    source: Source
    description: str
    aliases: dict[str, int]
    missing: tuple[str, ...]
    inputs: dict[str, Input]
    outputs: tuple[str, ...]
    graph: Raw | UnsetType = UNSET


class VersionView(Struct, frozen=True, kw_only=True, rename="camel"):
    """A version in the list of all, with what became of the workflows made from it."""

    version: int
    created_at: int
    saved_by: str
    source: Source
    description: str
    aliases: tuple[str, ...]
    statistics: Statistics


class VersionsReply(Struct, frozen=True):
    """The newest first."""

    name: str
    versions: list[VersionView]


class AliasRequest(Struct, frozen=True):
    """Which version the alias is to name."""

    version: _Number


class AliasesReply(Struct, frozen=True):
    """All aliases of a template, each with its version."""

    name: str
    aliases: dict[str, int]


class ProposeRequest(Struct, frozen=True):
    """A graph in API format."""

    graph: Annotated[Raw, Meta(extra_json_schema={"type": "object", "description": "In ComfyUI's API format."})]


class ProposeReply(Struct, frozen=True):
    """In the shape that PUT takes."""

    inputs: dict[str, Input]


_definition = msgspec.json.Decoder(Definition)
_alias = msgspec.json.Decoder(AliasRequest)
_propose = msgspec.json.Decoder(ProposeRequest)

_Name = Annotated[str, PathParameter(pattern=NAME, description="Lower-case letters, digits and hyphens, 64 at most.")]
_Reference = Annotated[
    str,
    PathParameter(
        min_length=1, max_length=130, description="A name; `name@prod` for an alias, `name@3` for a version."
    ),
]
_Alias = Annotated[
    str, PathParameter(pattern=ALIAS, description="A letter, then letters, digits and hyphens, 32 at most.")
]

_GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 1, "color": 3368652}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "tile"}},
}
_INPUTS: dict[str, Any] = {
    "color": {"node": "1", "input": "color", "type": "color", "description": "As #rrggbb."},
    "width": {"node": "1", "input": "width", "maximum": 2048},
}
_DEFINITION = {"graph": _GRAPH, "inputs": _INPUTS, "outputs": ["2"], "description": "A tile of one color."}
_SAVED = {
    "name": "tile",
    "version": 1,
    "createdAt": 1795349867341,
    "savedBy": "admin",
    "source": "api",
    "description": "A tile of one color.",
    "aliases": {},
    "missing": [],
    "inputs": _INPUTS,
    "outputs": ["2"],
}


@put(
    PATH + "/{name:str}",
    summary="Save a template",
    description=(
        "A graph, and which of its inputs are parameters. Every save is a new version, and versions never change. "
        "Types, ranges and lists come from ComfyUI where the template does not say them, or says them wider."
    ),
    tags=["templates"],
    status_code=201,
    responses={
        201: ResponseSpec(TemplateView, description="It is on disk.", generate_examples=False),
        **problems(413, 415, 422, 503),
    },
    opt=documented(body=Definition, request=_DEFINITION, reply=_SAVED),
)
async def save_template(
    request: Request[Any, Any, Any], templates: NamedDependency[Templates], name: _Name
) -> Response[TemplateView]:
    """A new version."""
    definition = await read_json(request, _definition)
    version = await templates.save(name, definition, saved_by=caller_of(request).name)
    headers = {"location": f"{PATH}/{name}?version={version.number}"}
    return Response(await _view(templates, version, with_graph=False), status_code=201, headers=headers)


@get(
    PATH,
    summary="List templates",
    description=(
        "All of them, by name. `missing` names node classes that no ComfyUI has any more; `broken` the files that "
        "could not be read at the start."
    ),
    tags=["templates"],
    opt=documented(
        reply={
            "templates": [
                {
                    "name": "tile",
                    "version": 3,
                    "description": "A tile of one color.",
                    "aliases": {"prod": 2},
                    "versions": 3,
                    "source": "api",
                    "missing": [],
                }
            ],
            "broken": [],
        }
    ),
)
async def list_templates(templates: NamedDependency[Templates]) -> ListReply:
    """By name."""
    listed = [
        Listed(
            name=name,
            version=head.newest.number,
            description=head.newest.definition.description,
            aliases=head.aliases,
            versions=head.count,
            source=head.newest.source,
            missing=(await templates.takes(head.newest)).missing,
        )
        for name, head in templates.heads()
    ]
    return ListReply(listed, [BrokenFile(one.path.name, one.reason) for one in templates.broken])


@get(
    PATH + "/{name:str}",
    summary="Look at a template",
    description="Its newest version, or the one that is named: `?version=2`, `name@2`, or `name@prod` for an alias.",
    tags=["templates"],
    responses=problems(404),
    opt=documented(reply=_SAVED | {"graph": _GRAPH}),
)
async def get_template(
    templates: NamedDependency[Templates],
    name: _Reference,
    version: Annotated[int | None, QueryParameter(ge=1, le=2**31, description="The number of a version.")] = None,
) -> TemplateView:
    """One version."""
    return await _view(templates, await _find(templates, name, version), with_graph=True)


@get(
    PATH + "/{name:str}/versions",
    summary="The versions of a template",
    description=(
        "The newest first, each with what became of the workflows made from it, as far as they are kept: `runs` that "
        "ended, `failures`, and seconds of execution."
    ),
    tags=["templates"],
    responses=problems(404),
    opt=documented(
        reply={
            "name": "tile",
            "versions": [
                {
                    "version": 1,
                    "createdAt": 1795349867341,
                    "savedBy": "admin",
                    "source": "api",
                    "description": "A tile of one color.",
                    "aliases": ["prod"],
                    "statistics": {"runs": 214, "failures": 3, "p50Seconds": 1.204, "p95Seconds": 2.977},
                }
            ],
        }
    ),
)
async def list_versions(templates: NamedDependency[Templates], name: FromPath[str]) -> VersionsReply:
    """All that are kept."""
    versions = await templates.versions(name)
    statistics = await templates.statistics(name)
    aliases = templates.head(name).aliases
    views = [
        VersionView(
            version=version.number,
            created_at=version.created_at,
            saved_by=version.saved_by,
            source=version.source,
            description=version.definition.description,
            aliases=tuple(alias for alias, number in aliases.items() if number == version.number),
            statistics=statistics.get(version.number, Statistics()),
        )
        for version in versions
    ]
    return VersionsReply(name, views)


@get(
    PATH + "/{name:str}/schema",
    summary="What a template takes",
    description=(
        "The JSON Schema (2020-12) of the body of `POST /v1/generate/{template}`, with the ranges and lists that "
        "ComfyUI has told."
    ),
    tags=["templates"],
    responses=problems(404),
    opt=documented(
        reply={
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "tile",
            "type": "object",
            "properties": {"width": {"type": "integer", "minimum": 1, "maximum": 2048, "default": 512}},
            "additionalProperties": False,
        }
    ),
)
async def template_schema(
    templates: NamedDependency[Templates],
    name: _Reference,
    version: Annotated[int | None, QueryParameter(ge=1, le=2**31, description="The number of a version.")] = None,
) -> dict[str, Any]:
    """Its schema."""
    found = await _find(templates, name, version)
    return schema(found, (await templates.takes(found)).parameters)


@put(
    PATH + "/{name:str}/aliases/{alias:str}",
    summary="Let an alias name a version",
    description="Such as `prod`: `POST /v1/generate/tile@prod` then uses this version, until the alias is moved.",
    tags=["templates"],
    status_code=200,
    responses=problems(404, 413, 415, 503),
    opt=documented(body=AliasRequest, request={"version": 1}, reply={"name": "tile", "aliases": {"prod": 1}}),
)
async def set_alias(
    request: Request[Any, Any, Any], templates: NamedDependency[Templates], name: FromPath[str], alias: _Alias
) -> AliasesReply:
    """Move or make it."""
    wanted = await read_json(request, _alias)
    head = await templates.set_alias(name, alias, wanted.version)
    return AliasesReply(name, head.aliases)


@delete(
    PATH + "/{name:str}",
    summary="Delete a template",
    description="All its versions and aliases. What was made from it stays, and its numbers never come again.",
    tags=["templates"],
    status_code=204,
    responses=problems(404, 503),
)
async def delete_template(templates: NamedDependency[Templates], name: FromPath[str]) -> None:
    """Gone."""
    await templates.delete(name)


@post(
    PATH + "/propose",
    summary="Propose parameters for a graph",
    description=(
        "Inputs that people want to change, guessed from titles, node classes and what ComfyUI says of them, in the "
        "shape that PUT takes: read it, trim it, save it. Nothing is stored."
    ),
    tags=["templates"],
    status_code=200,
    responses=problems(413, 415, 422),
    opt=documented(body=ProposeRequest, request={"graph": _GRAPH}, reply={"inputs": _INPUTS}),
)
async def propose_inputs(request: Request[Any, Any, Any], templates: NamedDependency[Templates]) -> ProposeReply:
    """A beginning."""
    body = await read_json(request, _propose)
    return ProposeReply(await templates.propose(Definition(graph=body.graph)))


async def _find(templates: Templates, reference: str, number: int | None) -> Version:
    if number is None:
        return await templates.find(reference)
    return await templates.version(split_reference(reference)[0], number)


async def _view(templates: Templates, version: Version, *, with_graph: bool) -> TemplateView:
    definition = version.definition
    return TemplateView(
        name=version.name,
        version=version.number,
        created_at=version.created_at,
        saved_by=version.saved_by,
        source=version.source,
        description=definition.description,
        aliases=templates.head(version.name).aliases,
        missing=(await templates.takes(version)).missing,
        inputs=definition.inputs,
        outputs=definition.outputs,
        graph=definition.graph if with_graph else UNSET,
    )


template_routes = [
    save_template,
    list_templates,
    get_template,
    list_versions,
    template_schema,
    set_alias,
    delete_template,
    propose_inputs,
]
