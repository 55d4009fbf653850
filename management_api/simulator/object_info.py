"""What `/object_info` says: the interfaces of the classes that the simulator runs (`object_info.json`).

The lists of input files and models are filled in when asked. Nothing here runs a node.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from management_api.simulator.folders import Folders


@cache
def _classes() -> dict[str, dict[str, Any]]:
    return msgspec.json.decode(
        (Path(__file__).parent / "object_info.json").read_bytes(), type=dict[str, dict[str, Any]]
    )


def leave_out(class_types: Iterable[str]) -> None:
    """From now on this process knows nothing of these classes, as a ComfyUI without some custom nodes."""
    for class_type in class_types:
        del _classes()[class_type]


def known(class_type: object) -> bool:
    """Whether the class exists here."""
    return isinstance(class_type, str) and class_type in _classes()


def is_output(class_type: str) -> bool:
    """Whether nodes of the class are results."""
    return bool(_classes()[class_type]["output_node"])


def hidden_inputs(class_type: str) -> dict[str, str]:
    """Names and kinds of the inputs that the server fills in."""
    hidden: dict[str, str] = _classes()[class_type]["input"].get("hidden", {})
    return hidden


def output_types(class_type: str) -> list[str]:
    """The types of the outputs, by slot."""
    types: list[str] = _classes()[class_type]["output"]
    return types


def describe(class_type: str, folders: Folders) -> dict[str, Any]:
    """The entry of one class, its lists up to date. KeyError for an unknown class."""
    info = _classes()[class_type]
    if class_type == "LoadImage":
        return _with_list(info, "image", folders.inputs())
    if class_type == "CheckpointLoaderSimple":
        return _with_list(info, "ckpt_name", folders.models("checkpoints"))
    if class_type == "LoraLoader":
        return _with_list(info, "lora_name", folders.models("loras"))
    return info


def describe_all(folders: Folders) -> dict[str, Any]:
    """All classes."""
    return {name: describe(name, folders) for name in _classes()}


def _with_list(info: dict[str, Any], name: str, values: list[str]) -> dict[str, Any]:
    required = info["input"]["required"]
    changed = required | {name: [values, *required[name][1:]]}
    return info | {"input": info["input"] | {"required": changed}}
