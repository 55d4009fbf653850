"""File names that leave the folders of ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

from managers.comfyui.object_info import Catalog
from managers.comfyui.validation import validate
from tests.graphs import (
    AWAY,
    CATALOG,
    EMPTY_IMAGE,
    codes,
    info_of,
    save,
)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("probe-input.png", True),
        ("jobs/0001/a b.png", True),
        ("x.png [output]", True),
        ("..x.png", True),
        ("a..b/c", True),
        ("../x.png", False),
        ("a/../../x.png", False),
        ("a/..", False),
        ("..", False),
        ("foo/..X[output]", False),  # ComfyUI cuts the letter before the bracket as well
        ("/etc/hostname", False),
        ("/etc/hostname [input]", False),
        ("C:/x.png", False),
        ("c:x.png", False),
        ("\\\\server\\x.png", False),
        ("a\\..\\b.png", False),
        ("a\0b", False),
    ],
)
def test_names_that_loaders_may_be_given(name: str, safe: bool) -> None:
    for value in (name, {"__value__": name}):
        for catalogs in ([CATALOG], [AWAY]):
            graph = {"1": {"class_type": "LoadImage", "inputs": {"image": value}}, "2": save(["1", 0])}
            verdict = validate(graph, catalogs)
            assert ("unsafe_file_name" not in codes(verdict)) is safe
            assert verdict.fatal is not safe


def test_every_file_input_is_looked_at() -> None:
    def fatal(class_type: str, **inputs: Any) -> bool:
        graph = {"1": {"class_type": class_type, "inputs": inputs}, "2": save(["1", 0])}
        return "unsafe_file_name" in codes(validate(graph, [CATALOG]))

    for class_type, name in {
        "LoadImageMask": "image",
        "LoadImageOutput": "image",
        "LoadAudio": "audio",
        "LoadVideo": "file",
        "LoadLatent": "latent",
        "Load3D": "model_file",
        "RecordAudio": "audio",
    }.items():
        assert fatal(class_type, **{name: "/etc/passwd"}), class_type
    assert fatal("Load3D", image={"image": "a.png", "mask": ["b.png", "../c.png"]})
    # A model's name is held against ComfyUI's own list, and a path of the machine may be what a custom node wants.
    assert not fatal("LoraLoader", lora_name="style\\ink.safetensors")
    assert not fatal("VHS_LoadVideoPath", video="/data/in.mp4")
    assert not fatal("PrimitiveString", value="../x")
    # What the class itself says to be an uploaded file.
    info = info_of(picture=[["win\\x.png"], {"image_upload": True}])
    for name, code in (("win\\y.png", "unsafe_file_name"), ("win\\x.png", None)):
        graph = {"1": {"class_type": "Probe", "inputs": {"picture": name}}}
        assert ("unsafe_file_name" in codes(validate(graph, [Catalog("local", info)]))) is (code is not None)


@pytest.mark.parametrize(
    ("prefix", "safe"),
    [
        ("probe/x", True),
        ("job-1/%year%-%month%-%day%/img_%width%x%height%", True),
        ("a/../b", True),
        ("win\\dir\\img", True),
        ("...", True),
        (5, True),
        ("../../escape/x", False),
        ("a/../../x", False),
        ("a\\..\\..\\x", False),
        ("/abs/x", False),
        ("\\abs", False),
        ("C:\\x", False),
        ("x\0", False),
    ],
)
def test_prefixes_that_files_may_be_saved_under(prefix: object, safe: bool) -> None:
    verdict = validate({"1": EMPTY_IMAGE, "2": save(["1", 0], prefix)}, [CATALOG])
    assert codes(verdict) == ({} if safe else {"unsafe_file_name": "error"})
