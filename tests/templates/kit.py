"""Templates against what a real ComfyUI 0.3.64 says of its classes, with some models installed."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from managers.comfyui.graph import parse_graph
from managers.comfyui.object_info import Catalog, read_object_info
from managers.templates.files import BOX, Broken, read_folder
from managers.templates.model import Definition, Source, Version
from managers.templates.parameter import Parameter
from managers.templates.resolve import of_definition
from tests.recordings import DATA

INSTALLED = {
    ("CheckpointLoaderSimple", "ckpt_name"): ["sd15.safetensors", "sdxl-base-1.0.safetensors"],
    ("LoraLoader", "lora_name"): ["ink.safetensors"],
    ("ControlNetLoader", "control_net_name"): ["canny.safetensors"],
    ("UpscaleModelLoader", "model_name"): ["4x.pth"],
    ("LoadImage", "image"): ["lamp.png", "mask.png"],
    ("LoadImageMask", "image"): ["lamp.png", "mask.png"],
}


def object_info(installed: dict[tuple[str, str], list[str]] | None = None) -> dict[str, Any]:
    """What `/object_info` says, with these lists."""
    told: dict[str, Any] = json.loads((DATA / "templates" / "object_info.json").read_text())
    for (class_type, name), values in (INSTALLED if installed is None else installed).items():
        spec = told[class_type]["input"]["required"][name]
        if isinstance(spec[0], list):
            spec[0] = values
        else:
            spec[1]["options"] = values
    return told


CATALOG = Catalog("local", read_object_info(object_info()))


def boxed() -> dict[str, Definition]:
    found = {}
    for one in read_folder(BOX):
        assert not isinstance(one, Broken), one
        found[one.name] = one.definition
    return found


def version(definition: Definition, name: str = "test", number: int = 1) -> Version:
    return Version(name=name, number=number, created_at=0, source=Source.API, saved_by="admin", definition=definition)


def definition(graph: Any, **inputs: Any) -> Definition:
    return msgspec.convert({"graph": msgspec.Raw(msgspec.json.encode(graph)), "inputs": inputs}, Definition)


def takes(given: Definition, *catalogs: Catalog) -> dict[str, Parameter]:
    return of_definition(given, parse_graph(version(given).nodes()), catalogs or (CATALOG,))


def no_random(below: int) -> int:
    return below - 1
