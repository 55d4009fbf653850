"""File names in a workflow that leave ComfyUI's folders.

ComfyUI does not confine what its loaders read: `../output/x.png` and `/etc/hostname` pass its check when the file
exists (PROTOCOL §7). Must never judge names that a custom node means to be paths of the machine: only inputs that are
known, or say of themselves, to name a file in ComfyUI's own folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set

from managers.comfyui.graph import Graph, Node, pointer, shown
from managers.comfyui.object_info import InputSpec, ObjectInfo
from managers.events.types import Finding

# Nodes that read a file named by the client, whether or not /object_info says so (LoadLatent, RecordAudio do not).
_LOADERS = frozenset(
    "LoadImage LoadImageMask LoadImageOutput LoadAudio LoadVideo LoadLatent Load3D Load3DAnimation WebcamCapture"  # noqa: SIM905
    " RecordAudio LoadImageSetFromFolderNode LoadImageTextSetFromFolderNode VHS_LoadVideo VHS_LoadAudioUpload".split()
)
_PREFIX = "filename_prefix"
_ANNOTATIONS = {"[output]": 9, "[input]": 8, "[temp]": 7}
_DRIVE = re.compile(r"[A-Za-z]:")


def annotated(name: str) -> tuple[str, bool]:
    """The file a loader opens for `name`, and whether a folder was named: `x.png [output]` -> `x.png`, True."""
    for ending, length in _ANNOTATIONS.items():
        if name.endswith(ending):
            return name[:-length], True
    return name, False


def unsafe_read(name: str) -> str | None:
    """Why a loader must not be given `name`, in words that follow it; None when it stays in its folder."""
    plain, _ = annotated(name)
    if "\0" in name:
        return "holds a NUL character"
    if plain.startswith("/") or _DRIVE.match(plain):
        return "is an absolute path"
    if "\\" in name:
        return "holds a backslash"
    if ".." in name and (".." in plain.split("/") or ".." in name.split("/")):
        return "leaves its folder by '..'"
    return None


def unsafe_prefix(prefix: str) -> str | None:
    """Why a file must not be saved under `prefix`; None when it stays in the output folder.

    Separators of both systems count: which one the backend runs on is not known here.
    """
    if "\0" in prefix:
        return "holds a NUL character"
    parts = prefix.replace("\\", "/").split("/")
    if (len(parts) > 1 and not parts[0]) or _DRIVE.match(prefix):
        return "is an absolute path"
    depth = 0
    for part in parts:
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return "leaves the output folder by '..'"
    return None


def unsafe_names(graph: Graph, infos: Sequence[ObjectInfo], live: Set[str]) -> list[Finding]:
    """One finding for each unsafe name: an error on nodes that will run (`live`), a warning on the others."""
    specs = {kind: _file_specs(kind, infos) for kind in {node.class_type for node in graph.values()}}
    return [
        Finding(
            code="unsafe_file_name",
            message=f"{node.class_type} ({node.id}): {name} {shown(value)} {reason}.",
            pointer=pointer(node.id, "inputs", name),
            severity="error" if node.id in live else "warning",
            node_id=node.id,
            class_type=node.class_type,
            input=name,
        )
        for node in graph.values()
        if specs[node.class_type] or node.class_type in _LOADERS or _PREFIX in node.inputs
        for name, value, reason in _unsafe(node, specs[node.class_type])
    ]


def _file_specs(class_type: str, infos: Sequence[ObjectInfo]) -> dict[str, list[InputSpec]]:
    """The inputs of a class that say of themselves to name a file, as each backend declares them."""
    specs: dict[str, list[InputSpec]] = {}
    for info in infos:
        for name, spec in info[class_type].inputs.items() if class_type in info else ():
            if spec.file or class_type in _LOADERS:
                specs.setdefault(name, []).append(spec)
    return specs


def _unsafe(node: Node, specs: Mapping[str, Sequence[InputSpec]]) -> Iterator[tuple[str, str, str]]:
    for name, given in node.inputs.items():
        if name == _PREFIX:
            if isinstance(given, str) and (reason := unsafe_prefix(given)):
                yield name, given, reason
        elif name in specs or node.class_type in _LOADERS:
            for text in _texts(given):
                reason = unsafe_read(text)
                # A name that the backend itself lists is one of its own: on Windows with a backslash.
                if reason and not any(spec.options and text in spec.options for spec in specs.get(name, ())):
                    yield name, text, reason


def _texts(value: object) -> Iterator[str]:
    """The texts anywhere in `value`: Load3D takes an object of file names."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)
