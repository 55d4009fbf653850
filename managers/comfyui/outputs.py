"""What a node's `output` holds, as outputs of ours (PROTOCOL §4). Pure.

Must never trust a name: file names come from custom nodes and are checked again where files are opened.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from managers.events.types import Output, OutputKind

_KINDS: dict[str, OutputKind] = {
    **dict.fromkeys(
        ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "exr", "hdr", "svg"), "image"
    ),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi", "m4v", "ogv"), "video"),
    **dict.fromkeys(("flac", "mp3", "wav", "ogg", "opus", "m4a", "aac"), "audio"),
    **dict.fromkeys(("glb", "gltf", "obj", "ply", "stl", "fbx", "usdz", "splat"), "3d"),
    "latent": "latent",
}
_TYPES = {
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".flac": "audio/flac",
    ".opus": "audio/ogg",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".latent": "application/octet-stream",
}
_KNOWN = frozenset({"filename", "subfolder", "type", "fullpath"})  # fullpath: a path of that machine, never passed on


def content_type(filename: str) -> str:
    """The media type by extension, as ComfyUI's own /view does."""
    suffix = PurePosixPath(filename).suffix.lower()
    return _TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"


def kind_of(filename: str, *, animated: bool = False) -> OutputKind:
    """The kind by extension: videos stand under `images` too (PROTOCOL §4). An animated picture is a video."""
    kind = _KINDS.get(PurePosixPath(filename).suffix.lower().lstrip("."), "file")
    return "video" if animated and kind == "image" else kind


def outputs_of(node_id: str, output: object) -> Iterator[Output]:
    """Walk every list of a node's output: an object with `filename` is a file, strings under `text` are texts.

    Preview3D puts the model's path as the first string under `result`. All else is data, not an output.
    """
    if not isinstance(output, Mapping):
        return
    animated = _flag(output.get("animated"))
    for key, values in output.items():
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, Mapping) and isinstance(value.get("filename"), str) and value["filename"]:
                yield _file(node_id, value, animated=animated)
            elif isinstance(value, str) and key == "text":
                yield Output(kind="text", node_id=node_id, text=value)
            elif isinstance(value, str) and key == "result" and kind_of(value) == "3d":
                path = PurePosixPath(value.replace("\\", "/"))
                folder = "" if str(path.parent) == "." else str(path.parent)
                yield _file(node_id, {"filename": path.name, "subfolder": folder}, animated=False)


def _flag(value: object) -> bool:
    return bool(value[0]) if isinstance(value, list | tuple) and value else bool(value)


def _file(node_id: str, item: Mapping[str, Any], *, animated: bool) -> Output:
    name = item["filename"]
    subfolder, folder = item.get("subfolder"), item.get("type")
    extra = {key: value for key, value in item.items() if key not in _KNOWN}
    return Output(
        kind=kind_of(name, animated=animated),
        node_id=node_id,
        filename=name,
        subfolder=subfolder.replace("\\", "/") if isinstance(subfolder, str) else "",
        type=folder if isinstance(folder, str) and folder else "output",
        content_type=content_type(name),
        extra=extra or None,
    )
