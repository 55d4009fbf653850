"""Which inputs of a graph name a file that is still elsewhere: a URL, or the file itself as a `data:` URI.

Pure. Must never take a text for a file that the node takes as a text: only the inputs of loaders count, those that
say of themselves that a file is uploaded for them, and those that are known for it. Plain base64 is no source: it
cannot be told from a name.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import Raw, Struct

from managers.comfyui.graph import Graph
from managers.comfyui.object_info import InputSpec, NodeClass

ClassOf = Callable[[str], NodeClass | None]

# Loaders whose list is one of plain names in some versions: nothing in it says that files are uploaded for it.
_LOADERS = {
    "LoadImage": "image",
    "LoadImageMask": "image",
    "LoadImageOutput": "image",
    "LoadAudio": "audio",
    "LoadVideo": "file",
    "VHS_LoadVideo": "video",
    "VHS_LoadVideoFFmpeg": "video",
    "VHS_LoadAudioUpload": "audio",
}
_SOURCE = re.compile(r"(https?://|data:)", re.IGNORECASE)
_PERHAPS = re.compile(rb"https?:|data:|\\u", re.IGNORECASE)  # JSON may write any letter as \u…
_object = msgspec.json.Decoder(dict[str, Raw])
_DATA = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100}){0,10}?;base64,", re.IGNORECASE)


class Source(Struct, frozen=True):
    """An input that names a file elsewhere."""

    node_id: str
    class_type: str
    input: str
    value: str


class NotDecodable(Exception):
    """It is no `data:` URI with base64; the message is a sentence."""


def is_source(class_type: str, name: str, value: object, spec: InputSpec | None) -> bool:
    """Whether this value of an input is fetched and put in place before ComfyUI gets the graph."""
    if not isinstance(value, str) or not _SOURCE.match(value):
        return False
    return _LOADERS.get(class_type) == name or (spec is not None and spec.file)


def perhaps_sources(graph: bytes) -> bool:
    """Whether it is worth looking into a graph's JSON text: False is certain."""
    return _PERHAPS.search(graph) is not None


def sources(graph: Graph, class_of: ClassOf) -> list[Source]:
    """All of them, in the order of the graph."""
    found = []
    for node in graph.values():
        for name, value in node.inputs.items():
            if isinstance(value, str) and _SOURCE.match(value):
                declared = class_of(node.class_type)
                spec = None if declared is None else declared.inputs.get(name)
                if is_source(node.class_type, name, value, spec):
                    found.append(Source(node.id, node.class_type, name, value))
    return found


def placed(graph: bytes, names: Mapping[Source, str]) -> bytes:
    """The graph's JSON text with the names of files in place of their sources; all else stays as it is."""
    nodes = _object.decode(graph)
    for node_id in {source.node_id for source in names}:
        node = _object.decode(nodes[node_id])
        inputs = _object.decode(node["inputs"])
        inputs |= {
            source.input: Raw(msgspec.json.encode(name))
            for source, name in names.items()
            if source.node_id == node_id
        }
        node["inputs"] = Raw(msgspec.json.encode(inputs))
        nodes[node_id] = Raw(msgspec.json.encode(node))
    return msgspec.json.encode(nodes)


def is_data(value: str) -> bool:
    """A `data:` URI, and no URL."""
    return value[:5].lower() == "data:"


def decoded(uri: str) -> bytes:
    """The bytes of a `data:` URI. What it says of their type is not believed. Raises `NotDecodable`."""
    found = _DATA.match(uri)
    if found is None:
        raise NotDecodable("it is no data: URI with base64, like data:image/png;base64,iVBORw0…")
    text = uri[found.end() :].encode("utf-8", "replace")
    if b"%" in text:
        text = unquote_to_bytes(text)
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error:
        raise NotDecodable("what stands behind base64, is no base64") from None
