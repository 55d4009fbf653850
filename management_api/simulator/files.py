"""`/view` and `/upload/*`: the files of the simulator over HTTP (PROTOCOL 2)."""

import hashlib
import io
import mimetypes
import os
from email.utils import formatdate
from pathlib import Path
from typing import Final

import msgspec
from multipart import (  # type: ignore[import-untyped]  # it has no stubs
    MultipartError,
    MultipartParser,
    MultipartPart,
    parse_options_header,
)
from PIL import Image

from management_api.simulator.folders import Folders, split_annotation
from management_api.simulator.http import INTERNAL_ERROR, Reply, Request, as_json

_NEVER_SHOWN: Final = {"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def view(request: Request, folders: Folders) -> Reply:
    """One file, whole, in part, or converted. Reads the disk: to be called on a thread."""
    try:
        path = _viewed(request, folders)
    except _Refused as refused:
        return Reply(refused.status)
    disposition = (b"content-disposition", f'filename="{path.name}"'.encode())
    if "preview" in request.query:
        return _converted(path, request.query["preview"], disposition)
    channel = request.query.get("channel", "rgba")
    if channel in ("rgb", "a"):
        with Image.open(path) as image:
            buffer = io.BytesIO()
            _channel(image, channel).save(buffer, "PNG")
        return Reply(200, buffer.getvalue(), "image/png", (disposition,))
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    kind = "application/octet-stream" if kind in _NEVER_SHOWN else kind
    data = path.read_bytes()
    facts = path.stat()
    headers = (
        disposition,
        (b"accept-ranges", b"bytes"),
        (b"etag", f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'.encode()),
        (b"last-modified", formatdate(facts.st_mtime, usegmt=True).encode()),
    )
    span = _range(request.headers.get(b"range", b""), len(data))
    if span is None:
        return Reply(200, data, kind, headers)
    start, end = span
    if start >= len(data):
        return Reply(416, b"", "", (*headers, (b"content-range", f"bytes */{len(data)}".encode())))
    content_range = (b"content-range", f"bytes {start}-{end - 1}/{len(data)}".encode())
    return Reply(206, data[start:end], kind, (*headers, content_range))


def _viewed(request: Request, folders: Folders) -> Path:
    if "filename" not in request.query:
        raise _Refused(404)
    name, marked = split_annotation(request.query["filename"])
    if not name or name.startswith("/") or ".." in name:
        raise _Refused(400)
    try:
        base = folders.of(marked or request.query.get("type", "output"))
    except KeyError:
        raise _Refused(400) from None
    folder = _inside(base, request.query.get("subfolder", ""), 403)
    path = folder / Path(name).name  # directory parts inside the name are dropped
    if not path.is_file():
        raise _Refused(404)
    return path


def _inside(base: Path, part: str, status: int) -> Path:
    path = Path(os.path.abspath(os.path.join(base, part)))  # noqa: PTH100, PTH118 - an absolute part must win
    if os.path.commonpath((base, path)) != str(base):
        raise _Refused(status)
    return path


def _converted(path: Path, wish: str, disposition: tuple[bytes, bytes]) -> Reply:
    kind, _, quality = wish.partition(";")
    kind = kind if kind in ("webp", "jpeg") else "webp"
    with Image.open(path) as image:
        buffer = io.BytesIO()
        picture = image.convert("RGB") if kind == "jpeg" else image
        picture.save(buffer, kind, quality=int(quality) if quality.isdigit() else 90)
    return Reply(200, buffer.getvalue(), f"image/{kind}", (disposition,))


def _channel(image: Image.Image, channel: str) -> Image.Image:
    if channel == "rgb":
        return image.convert("RGB")
    alpha = image.convert("RGBA").getchannel("A")
    shown = Image.new("RGBA", image.size)
    shown.putalpha(alpha)
    return shown


def _range(header: bytes, size: int) -> tuple[int, int] | None:
    unit, _, span = header.decode("latin-1").partition("=")
    first, dash, last = span.partition("-")
    if unit != "bytes" or not dash or "," in span or not (first + last).isdigit():
        return None
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def upload(request: Request, body: bytes, folders: Folders, *, mask: bool) -> Reply:
    """Store an uploaded file. Writes the disk: to be called on a thread."""
    content_type, options = parse_options_header(request.headers.get(b"content-type", b"").decode("latin-1"))
    if content_type != "multipart/form-data":
        return INTERNAL_ERROR
    try:
        parts = MultipartParser(
            io.BytesIO(body), options.get("boundary", ""), memory_limit=len(body) + 1, buffer_size=len(body) + 1024
        )
        fields = {part.name: part for part in parts}
    except MultipartError:
        return INTERNAL_ERROR
    image = fields.get("image")
    if image is None or not image.filename:
        return Reply(400)
    kind = _value(fields, "type") or "input"
    try:
        base = folders.of(kind)
    except KeyError:
        return INTERNAL_ERROR
    subfolder = _value(fields, "subfolder")
    try:
        folder = _inside(base, os.path.normpath(subfolder) if subfolder else "", 400)
        path = _inside(base, str(folder / image.filename), 400)
    except _Refused as refused:
        return Reply(refused.status)
    folder.mkdir(parents=True, exist_ok=True)
    data = _masked(image.raw, fields, folders) if mask else image.raw
    if _value(fields, "overwrite") not in ("true", "1"):
        path, same = _free_name(path, data)
        if same:
            return as_json({"name": path.name, "subfolder": subfolder, "type": kind})
    path.write_bytes(data)
    return as_json({"name": path.name, "subfolder": subfolder, "type": kind})


def _value(fields: dict[str, MultipartPart], name: str) -> str:
    return str(fields[name].value) if name in fields else ""


def _free_name(path: Path, data: bytes) -> tuple[Path, bool]:
    wanted, digest, number = path, hashlib.sha256(data).digest(), 1
    while path.exists():
        if hashlib.sha256(path.read_bytes()).digest() == digest:
            return path, True
        path = wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")
        number += 1
    return path, False


def _masked(data: bytes, fields: dict[str, MultipartPart], folders: Folders) -> bytes:
    """The original picture with the alpha of the uploaded one (PROTOCOL: `original_ref`)."""
    if "original_ref" not in fields:
        return data
    reference = msgspec.json.decode(_value(fields, "original_ref"), type=dict[str, str])
    base = folders.of(reference.get("type", "output"))
    original = _inside(base, reference.get("subfolder", ""), 400) / Path(reference["filename"]).name
    with Image.open(original) as picture, Image.open(io.BytesIO(data)) as painted:
        merged = picture.convert("RGBA")
        merged.putalpha(painted.convert("RGBA").getchannel("A").resize(merged.size))
        buffer = io.BytesIO()
        merged.save(buffer, "PNG")
    return buffer.getvalue()
