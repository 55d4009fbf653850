"""The parts of inputs that need no server: what is a source, what is put in place, what a file is, where it waits."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from managers.comfyui.graph import parse_graph
from managers.comfyui.inputs import (
    NotDecodable,
    Source,
    decoded,
    perhaps_sources,
    placed,
    sources,
)
from managers.comfyui.media import media_in
from managers.comfyui.object_info import Catalog, read_object_info
from managers.comfyui.spool import Spool
from managers.comfyui.validation import validate
from managers.errors import TooLarge
from managers.workflows.inputs import safe_name
from tests.graphs import CATALOG, INFO, save

URL = "https://example.com/cat.png"


def found_in(graph: dict[str, Any], **classes: Any) -> list[tuple[str, str]]:
    info = {**INFO, **read_object_info(classes)}
    return [(source.node_id, source.input) for source in sources(parse_graph(graph), info.get)]


def loader(*spec: Any) -> dict[str, Any]:
    return {"input": {"required": {"file": list(spec)}}, "output": ["IMAGE"]}


# ---- what is a source


@pytest.mark.parametrize("value", [URL, "http://example.com/", "HTTPS://EXAMPLE.COM/x", "data:image/png;base64,AAAA"])
def test_loaders_take_sources(value: str) -> None:
    assert found_in({"1": {"class_type": "LoadImage", "inputs": {"image": value}}}) == [("1", "image")]
    wrapped = {"1": {"class_type": "LoadImage", "inputs": {"image": {"__value__": value}}}}
    assert found_in(wrapped) == [("1", "image")]
    assert sources(parse_graph(wrapped), lambda _: None), "known even where ComfyUI has told nothing yet"


@pytest.mark.parametrize(
    "value",
    [
        "cat.png",
        "ftp://example.com/x",
        "see https://example.com",
        "https:cat.png",
        "iVBORw0KGgo=",
        "",
        1,
        None,
        ["1", 0],
    ],
)
def test_names_links_and_plain_base64_are_none(value: Any) -> None:
    assert not found_in({"1": {"class_type": "LoadImage", "inputs": {"image": value}}})


@pytest.mark.parametrize("flag", ["image_upload", "video_upload", "audio_upload", "upload", "file_upload"])
def test_declared_uploads_take_sources(flag: str) -> None:
    graph = {"1": {"class_type": "Custom", "inputs": {"file": URL, "other": URL}}}
    assert found_in(graph, Custom=loader(["a.png"], {flag: True})) == [("1", "file")]
    assert found_in(graph, Custom=loader("COMBO", {"options": ["a.png"], flag: True})) == [("1", "file")]
    assert not found_in(graph, Custom=loader(["a.png"], {flag: False}))


def test_texts_stay_texts() -> None:
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": URL, "clip": ["2", 0]}},
        "2": {"class_type": "LoadImageFromUrl", "inputs": {"url": URL}},
        "3": {"class_type": "VHS_LoadVideoPath", "inputs": {"video": URL}},
        "4": {"class_type": "VHS_LoadVideo", "inputs": {"video": URL, "format": URL}},
    }
    assert found_in(graph, LoadImageFromUrl=loader("STRING")) == [("4", "video")]


@pytest.mark.parametrize("text", ['"https://a"', '"HTTP:\\/\\/a"', '"\\u0068ttps://a"', '"DATA:,"', '"d\\u0061ta:"'])
def test_no_way_to_write_one_is_overlooked(text: str) -> None:
    graph = f'{{"1": {{"class_type": "LoadImage", "inputs": {{"image": {text}}}}}}}'
    assert perhaps_sources(graph.encode())


def test_most_graphs_are_not_looked_into() -> None:
    graph = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64}}, "2": save(["1", 0])}
    assert not perhaps_sources(json.dumps(graph).encode())


# ---- validation


def test_validation_says_nothing_of_sources() -> None:
    video = {"input": {"required": {"video": [["a.mp4", "b.mp4"]]}}, "output": ["IMAGE"]}
    catalog = Catalog("local", {**INFO, **read_object_info({"VHS_LoadVideo": video})})
    for class_type, name in (("LoadImage", "image"), ("VHS_LoadVideo", "video")):
        for value in (URL, "data:image/png;base64,AAAA", "data:image/png;base64,////"):
            graph = {"1": {"class_type": class_type, "inputs": {name: value}}, "2": save(["1", 0])}
            assert validate(graph, [catalog]).findings == (), (class_type, value)
            assert validate(graph, [catalog]).clean == ("local",)
    graph = {"1": {"class_type": "VHS_LoadVideo", "inputs": {"video": "c.mp4"}}, "2": save(["1", 0])}
    assert [finding.code for finding in validate(graph, [catalog]).findings] == ["value_not_in_list"]


def test_a_url_that_would_leave_a_folder_as_a_name_is_refused_as_such() -> None:
    for value in ("https://a/../../b", "https://a/..", "data:image/../../x;base64,AAAA", "https://a\\\\b"):
        graph = {"1": {"class_type": "LoadImage", "inputs": {"image": value}}, "2": save(["1", 0])}
        verdict = validate(graph, [CATALOG])
        assert verdict.fatal
        assert verdict.findings[0].code == "unsafe_file_name"


# ---- put in place


def test_only_the_sources_are_replaced() -> None:
    text = (
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "https://a", "n": 1.0, "b":123456789012345678901234}},'
        ' "2": {"class_type": "LoadImage", "inputs": {"image": {"__value__": "https://a"}, "x": ["1", 0]}},'
        ' "3": {"class_type": "Text", "inputs": {"text": "https://a"}, "_meta": {"title": "\\u00fc"}}, "4": null}'
    )
    names = {
        Source("1", "LoadImage", "image", "https://a"): "jobs/x/1.png",
        Source("2", "LoadImage", "image", "https://a"): "jobs/x/2.png",
    }
    wanted = json.loads(text)
    wanted["1"]["inputs"]["image"] = "jobs/x/1.png"
    wanted["2"]["inputs"]["image"] = "jobs/x/2.png"
    done = placed(text.encode(), names)
    assert json.loads(done) == wanted
    assert b"1.0" in done
    assert b"123456789012345678901234" in done


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64,aGk=",
        "DATA:;BASE64,aGk=",
        "data:a/b;charset=x;base64,aGk%3D",
        "data:a/b;base64,aG\n k=",
    ],
)
def test_data_uris_are_decoded(uri: str) -> None:
    assert decoded(uri) == b"hi"


@pytest.mark.parametrize(
    "uri", ["data:", "data:,hi", "data:image/png,hi", "data:image/png;base64", "data:a/b;base64,a", "data:a;base64,ü"]
)
def test_other_data_uris_are_not(uri: str) -> None:
    with pytest.raises(NotDecodable):
        decoded(uri)


# ---- what a file is


def pictured(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("PNG", ".png"), ("JPEG", ".jpg"), ("GIF", ".gif"), ("WEBP", ".webp"), ("TIFF", ".tif"), ("BMP", ".bmp")],
)
def test_real_pictures_are_known(kind: str, ending: str) -> None:
    media = media_in(pictured(kind))
    assert media is not None
    assert (media.type, media.ending) == (f"image/{kind.lower()}", ending)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "video/mp4"),
        (b"\0\0\0\x14ftypqt  ", "video/quicktime"),
        (b"\0\0\0\x20ftypM4A ", "audio/mp4"),
        (b"\0\0\0\x20ftypavif", "image/avif"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm", "video/webm"),
        (b"\x1aE\xdf\xa3\x93B\x82\x88matroska", "video/x-matroska"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "audio/wav"),
        (b"RIFF\x24\0\0\0AVI LIST", "video/x-msvideo"),
        (b"OggS\0\2" + bytes(22) + b"\1vorbis", "audio/ogg"),
        (b"ID3\4\0", "audio/mpeg"),
        (b"\xff\xfb\x90\0", "audio/mpeg"),
        (b"fLaC\0", "audio/flac"),
    ],
)
def test_films_and_sounds_are_known(head: bytes, kind: str) -> None:
    media = media_in(head)
    assert media is not None
    assert media.type == kind


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"<!doctype html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'>",
        b"%PDF-1.7",
        b"PK\3\4",
        b"\x7fELF",
        b"{}",
        b"BMW is a car",
        b"RIFF",
        b"#!/bin/sh",
        b"\x80\4pickle",
    ],
)
def test_all_else_is_not(head: bytes) -> None:
    assert media_in(head) is None


# ---- where it waits


async def test_what_is_small_stays_in_memory(tmp_path: Path) -> None:
    async with Spool(tmp_path / "inputs", 100) as spool:
        await spool.write(b"abc")
        await spool.write(b"def")
        assert [piece async for piece in spool.read()] == [b"abcdef"]
        assert (spool.size, spool.head) == (6, b"abcdef")
    assert not (tmp_path / "inputs").exists()


async def test_what_is_large_lies_in_a_file_without_a_name_and_many_may_read_it(tmp_path: Path) -> None:
    body = base64.b64encode(bytes(range(256)) * 12_000)

    async def whole(spool: Spool) -> bytes:
        return b"".join([piece async for piece in spool.read()])

    async with Spool(tmp_path / "inputs", len(body)) as spool:
        for at in range(0, len(body), 70_000):
            await spool.write(body[at : at + 70_000])
        assert (tmp_path / "inputs").is_dir()
        assert not list((tmp_path / "inputs").iterdir())
        assert await asyncio.gather(*(whole(spool) for _ in range(3))) == [body] * 3
        assert spool.head == body[:512]
        with pytest.raises(TooLarge):
            await spool.write(b"x")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\\\Bilder\\\\Mein Bild.PNG", "Mein_Bild.PNG"),
        ('a"\r\nX: y.png', "a_X_y.png"),
        (".png", "png"),
        ("..", "file"),
        ("", "file"),
        ("猫.png", "_.png"),
        ("x" * 300 + ".jpeg", "x" * 95 + ".jpeg"),
        ("cat.png [output]", "cat.png_output_"),
    ],
)
def test_names_are_made_safe(given: str, name: str) -> None:
    assert safe_name(given) == name
