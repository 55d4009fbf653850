"""The operations that templates add to the description of the API: one for each, as they come and go at run time.

Everybody may read the description, so it must never name what lies on the machines: lists of models and of input
files are left out. (`/v1/templates/{name}/schema` has them, for those with a key.)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from managers.templates.model import Kind, Version
from managers.templates.parameter import Parameter
from managers.templates.registry import Templates
from managers.templates.schema import example, of_parameter, schema

GENERIC = "/v1/generate/{template}"
_FILES = (".safetensors", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".gguf", ".sft", ".onnx", ".yaml", ".pkl")


def mark(templates: Templates) -> Hashable:
    """Another one when the operations are others."""
    return templates.revision, templates.answers


def operations(templates: Templates, generic: Mapping[str, Any]) -> dict[str, Any]:
    """Paths like `/v1/generate/txt2img`, each the generic operation with the body of its template."""
    return {
        GENERIC.replace("{template}", name): {"post": _operation(templates, head.newest, generic)}
        for name, head in templates.heads()
    }


def _operation(templates: Templates, version: Version, generic: Mapping[str, Any]) -> dict[str, Any]:
    takes = templates.takes_now(version)
    body = schema(version, takes.parameters)
    del body["$schema"]
    body["properties"] = {name: _public(parameter) for name, parameter in takes.parameters.items()}
    # What is missing on the machines is nobody's business either: a list that is empty is as if it were none.
    content = {"schema": body, "example": _example(takes.parameters)}
    if version.definition.description:
        words = f"{version.definition.description}\n\n{generic['description']}"
    else:
        words = generic["description"]
    return {
        **generic,
        "operationId": f"generate_{version.name.replace('-', '_')}",
        "summary": f"Generate: {version.name}",
        "description": words,
        "parameters": [one for one in generic.get("parameters", ()) if one.get("name") != "template"],
        "requestBody": {
            "required": any(parameter.required for parameter in takes.parameters.values()),
            "content": {"application/json": content},
        },
    }


def _public(parameter: Parameter) -> dict[str, Any]:
    if not _private(parameter):
        return of_parameter(parameter)
    told: dict[str, Any] = {"type": parameter.json_type}
    words = [parameter.description, "What there is to choose from is told by the schema of the template."]
    return told | {"description": " ".join(filter(None, words))}


def _example(takes: Mapping[str, Parameter]) -> dict[str, Any]:
    shown = example(takes.values())
    for name in shown:
        if _private(takes[name]):
            shown[name] = "picture.png" if takes[name].kind is Kind.FILE else "model.safetensors"
    return shown


def _private(parameter: Parameter) -> bool:
    """Whether its list names files."""
    if parameter.kind is Kind.FILE:
        return True
    return bool(parameter.backends) and any(
        not options or any(isinstance(one, str) and one.lower().endswith(_FILES) for one in options)
        for options in parameter.backends.values()
    )
