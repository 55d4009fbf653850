"""`python -m management_api.definitions`: writes docs/events.d.ts and docs/asyncapi.yaml from the stream's types.

Must never say anything that the JSON Schema (`routes.definitions`) does not: it only translates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from routes.definitions import events_schema

_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}
_NOTE = "Made by `make definitions` from the service's types. Not to be edited."


def typescript(schema: Mapping[str, Any]) -> str:
    """The definitions of a JSON Schema as TypeScript interfaces; `Frame` is what a client hears."""
    lines = [f"// {_NOTE}", ""]
    for name, one in schema["$defs"].items():
        lines += [*_comment(one.get("description")), *_declaration(name, one), ""]
    lines += [f"export type Frame = {_union(schema['oneOf'])};", ""]
    return "\n".join(lines)


def _declaration(name: str, one: Mapping[str, Any]) -> Iterator[str]:
    if "properties" not in one:
        yield f"export type {name} = {_type(one)};"
        return
    yield f"export interface {name} {{"
    required = one.get("required", ())
    for key, value in one["properties"].items():
        tag = key == "type" and "enum" in value
        yield f"  {key}{'' if tag or key in required else '?'}: {_type(value)};"
    yield "}"


def _comment(text: str | None) -> list[str]:
    return [f"/** {' '.join(text.split())} */"] if text else []


def _type(one: Mapping[str, Any]) -> str:
    if "$ref" in one:
        return str(one["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in one:
            return _union(one[key])
    if "enum" in one:
        return " | ".join(json.dumps(value) for value in one["enum"])
    match one.get("type"):
        case "array":
            inner = _type(one["items"]) if isinstance(one.get("items"), Mapping) else "unknown"
            return f"Array<{inner}>"
        case "object":
            values = one.get("additionalProperties")
            return f"Record<string, {_type(values) if isinstance(values, Mapping) else 'unknown'}>"
        case str() as plain:
            return _PLAIN[plain]
    return "unknown"


def _union(ones: Sequence[Mapping[str, Any]]) -> str:
    return " | ".join(dict.fromkeys(_type(one) for one in ones))


def asyncapi(schema: Mapping[str, Any], version: str) -> str:
    """The stream as AsyncAPI 3.0, in the part of YAML that is JSON."""
    moved = json.loads(json.dumps(schema).replace("#/$defs/", "#/components/schemas/"))

    def messages(ones: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = [_type(one) for one in ones]
        return {name: {"payload": {"$ref": f"#/components/schemas/{name}"}} for name in names}

    heard, said = messages(moved["oneOf"]), messages(moved["$defs"]["ClientFrame"]["oneOf"])
    channel = "#/channels/stream"
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "ComfyUI Management API: stream",
            "version": version,
            "description": f"{_NOTE} Previews come as binary frames in ComfyUI's format 4 unless JSON was asked for.",
        },
        "servers": {
            "local": {
                "host": "127.0.0.1:9090",
                "protocol": "ws",
                "security": [{"$ref": "#/components/securitySchemes/apiKey"}],
            }
        },
        "channels": {"stream": {"address": "/v1/comfyui/stream", "messages": heard | said}},
        "operations": {
            "hear": {
                "action": "send",
                "channel": {"$ref": channel},
                "messages": [{"$ref": f"{channel}/messages/{name}"} for name in heard],
            },
            "ask": {
                "action": "receive",
                "channel": {"$ref": channel},
                "messages": [{"$ref": f"{channel}/messages/{name}"} for name in said],
            },
        },
        "components": {
            "securitySchemes": {"apiKey": {"type": "httpApiKey", "name": "X-API-Key", "in": "header"}},
            "schemas": moved["$defs"],
        },
    }
    return f"# {_NOTE}\n{json.dumps(document, indent=2, ensure_ascii=False)}\n"


def write(folder: Path) -> None:
    """Write both files."""
    schema = events_schema()
    (folder / "events.d.ts").write_text(typescript(schema))
    (folder / "asyncapi.yaml").write_text(asyncapi(schema, "1"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m management_api.definitions", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs"), help="where to write (default: docs)")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
