"""Graphs, and the classes and verdicts of a real ComfyUI 0.3.64 to hold them against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from managers.comfyui.object_info import Catalog, NodeClass, ObjectInfo, decode_object_info, read_object_info
from managers.comfyui.validation import Validation
from managers.events.types import Finding
from tests.recordings import DATA, cases, lines

INFO = decode_object_info((DATA / "object_info.json").read_bytes())
CATALOG = Catalog("local", INFO)
AWAY = Catalog("away", None)
WORKFLOWS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((DATA / "workflows").glob("*.json"))
    if not path.name.startswith("_")
}

EMPTY_IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
LOAD_IMAGE = {"class_type": "LoadImage", "inputs": {"image": "probe-input.png"}}


def save(source: object, prefix: object = "x") -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": source, "filename_prefix": prefix}}


def recorded_prompts() -> Iterator[tuple[str, Any, int, Any]]:
    """Every POST /prompt of the transcripts: case, prompt, status, answer."""
    for case in cases():
        asked: dict[int, Any] = {}
        for line in lines(case):
            if line.get("path") != "/prompt" or line.get("method") != "POST":
                continue
            if line["dir"] == "http-request":
                asked[line["id"]] = line.get("body")
            elif "status" in line and isinstance(body := asked.get(line["id"]), dict) and "prompt" in body:
                yield case, body["prompt"], line["status"], line.get("body")


def codes(verdict: Validation) -> dict[str, str]:
    return {finding.code: finding.severity for finding in verdict.findings}


def the_one(verdict: Validation) -> Finding:
    assert len(verdict.findings) == 1, verdict.findings
    return verdict.findings[0]


def info_of(**inputs: Any) -> ObjectInfo:
    """A catalogue with one output node `Probe` of these required inputs, beside the recorded classes."""
    probe = {"input": {"required": inputs}, "output": ["IMAGE"], "output_node": True}
    return {**INFO, **read_object_info({"Probe": probe})}


def without(*names: str) -> dict[str, NodeClass]:
    return {name: found for name, found in INFO.items() if name not in names}
