"""The models ComfyUI can load, as files below one folder for each type.

Must never hash a file: reading gigabytes is no work for a request. A hash is told only where a sidecar holds it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

ModelType = Literal["checkpoints", "loras", "vae", "controlnet", "upscale"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)

# What ComfyUI's own loaders take, and .gguf and .onnx, which well-known node packs load from the same folders.
# Other files there are readmes, previews, settings and the repository's place holders.
_EXTENSIONS = (".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft", ".gguf", ".onnx")
_SIDECAR = ".sha256"
_SHA256 = re.compile(rb"\s*([0-9a-fA-F]{64})(?![0-9a-zA-Z])")
_ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)
_MAX_LINKS = 40  # as the kernel


class Model(Struct, frozen=True, kw_only=True, rename="camel"):
    """One model file. `name` is relative to the type's folder, with `/`, as workflows name it on ComfyUI's side.

    `size` is in bytes, `modified_at` epoch ms, `hash` the SHA-256 in hex if `<file>.sha256` says it.
    """

    name: str
    type: ModelType
    size: int
    hash: str | None
    modified_at: int


def find_models(folders: Mapping[ModelType, Path], wanted: ModelType | None = None) -> list[Model]:
    """Every model, or those of one type, by type in the order of CONTRACT 5 and then by name.

    A folder that is missing or closed to us is empty. Blocks: call it in a thread.
    """
    types = MODEL_TYPES if wanted is None else (wanted,)
    return [model for kind in types if kind in folders for model in _models_of(kind, folders[kind])]


def _models_of(kind: ModelType, root: Path) -> list[Model]:
    found = []
    for entry, name, hashed in _walk(os.path.realpath(root), str(root), "", ()):
        try:
            facts = entry.stat()
        except OSError:  # a dangling link, or gone since the folder was read
            continue
        if stat.S_ISREG(facts.st_mode):
            modified_at = facts.st_mtime_ns // 1_000_000
            digest = _read_sidecar(entry.path + _SIDECAR) if hashed else None
            found.append(Model(name=name, type=kind, size=facts.st_size, hash=digest, modified_at=modified_at))
    return sorted(found, key=lambda model: model.name)


def _walk(
    root: str, folder: str, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[os.DirEntry[str], str, bool]]:
    """Yield (entry, relative name, has a sidecar). `above` holds the folders on the way here, to cut loops."""
    try:
        facts = os.stat(folder)  # noqa: PTH116 -- a plain string is five times quicker than Path here
        here = (facts.st_dev, facts.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except _ABSENT:
        return
    names = {entry.name for entry in listed}
    for entry in listed:
        if entry.name.startswith(".") or not _is_text(entry.name):
            continue
        if entry.is_symlink() and _climbs_out(entry.path, root):
            continue
        name = prefix + entry.name
        if _is_folder(entry):
            yield from _walk(root, entry.path, name + "/", (*above, here))
        elif entry.name.lower().endswith(_EXTENSIONS):
            yield entry, name, entry.name + _SIDECAR in names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _is_text(name: str) -> bool:
    """False for a name that is no UTF-8: neither JSON nor a workflow could carry it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _climbs_out(link: str, root: str) -> bool:
    """Whether a link below the real path `root` leaves it by `..` (CONTRACT 5).

    An absolute link is the operator's word, mostly to another disk: it is followed, and so are relative ones there.
    """
    place = Path(link)
    for _ in range(_MAX_LINKS):
        folder = Path(os.path.realpath(place.parent))
        if not place.is_symlink() or not folder.is_relative_to(root):
            return False
        target = place.readlink()
        if target.is_absolute():
            return False
        place = Path(os.path.normpath(folder / target))
        if not place.is_relative_to(root):
            return True
    return True


def _read_sidecar(path: str) -> str | None:
    try:
        with open(path, "rb") as sidecar:  # noqa: PTH123
            match = _SHA256.match(sidecar.read(1024))
    except OSError:
        return None
    return match[1].decode().lower() if match else None
