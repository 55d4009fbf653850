"""Which inputs of a graph people want to change, guessed from titles, classes and what `/object_info` says.

Pure. A proposal is a beginning, to be read and trimmed; what it proposes can be saved as it is. Must never propose an
input that is linked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct
from msgspec.structs import replace

from managers.comfyui.graph import Graph, Node
from managers.comfyui.object_info import Catalog, InputSpec
from managers.templates.model import MAX_PARAMETERS, Input, Kind, Place
from managers.templates.resolve import SEEDS

_NAMES: Mapping[str, str] = {
    "seed": "seed",
    "noise_seed": "seed",
    "width": "width",
    "height": "height",
    "steps": "steps",
    "cfg": "cfg",
    "guidance": "guidance",
    "sampler_name": "sampler",
    "scheduler": "scheduler",
    "denoise": "denoise",
    "batch_size": "batch_size",
    "ckpt_name": "checkpoint",
    "unet_name": "model",
    "lora_name": "lora",
    "strength_model": "lora_strength",
    "control_net_name": "controlnet",
    "upscale_by": "upscale_by",
    "scale_by": "scale_by",
    "grow_mask_by": "grow_mask_by",
    "color": "color",
}
"""What inputs of these names are called; whatever node has them."""
_ORDER = ("prompt", "negative_prompt", *dict.fromkeys(_NAMES.values()))
_WORDS: Mapping[str, str] = {
    "prompt": "What to draw.",
    "negative_prompt": "What not to draw.",
    "width": "In pixels.",
    "height": "In pixels.",
    "steps": "Steps of the sampler.",
    "cfg": "How closely to follow the prompt.",
    "denoise": "How much of the picture is drawn anew, 0 to 1.",
    "batch_size": "How many pictures.",
}
_TEXTS = ("text", "prompt", "positive_prompt", "value", "string", "text_g", "clip_l", "t5xxl")
_FILES = frozenset({"image", "mask", "audio", "video", "file"})
_SLUG = re.compile(r"[^a-z0-9]+")


class _Guess(Struct):
    name: str
    node: Node
    place: Place
    value: Any
    kind: Kind | None = None


def propose(graph: Graph, catalogs: Sequence[Catalog]) -> dict[str, Input]:
    """The inputs, in the shape in which they are saved."""
    guesses = [*_prompts(graph), *(guess for node in graph.values() for guess in _of_node(node, catalogs))]
    proposed: dict[str, Input] = {}
    values: dict[str, Any] = {}
    for guess in guesses[:MAX_PARAMETERS]:
        known = proposed.get(guess.name)
        if known is not None and _like(values[guess.name], guess.value):
            proposed[guess.name] = replace(known, also=(*known.also, guess.place)[:50])  # one value for both
            continue
        name = guess.name if known is None else _another(guess, proposed)
        values[name] = guess.value
        proposed[name] = Input(
            node=guess.place.node,
            input=guess.place.input,
            type=UNSET if guess.kind is None else guess.kind,
            required=guess.kind is Kind.FILE,
            description=_description(guess, catalogs),
        )
    return dict(sorted(proposed.items(), key=_place_in_order))


def _of_node(node: Node, catalogs: Sequence[Catalog]) -> Iterator[_Guess]:
    for name, value in node.inputs.items():
        if name in node.links or isinstance(value, dict | list) or value is None:
            continue
        place = Place(node.id, name)
        specs = list(_specs(node, name, catalogs))
        loads = node.class_type.startswith("Load") and name in _FILES and isinstance(value, str)
        if any(spec.file for spec in specs) or loads:
            yield _Guess("mask" if "Mask" in node.class_type else name, node, place, value, Kind.FILE)
        elif name == "color" and type(value) is int:
            yield _Guess("color", node, place, value, Kind.COLOR)
        elif name == "model_name" and "Upscale" in node.class_type:
            yield _Guess("upscale_model", node, place, value)
        elif name == "strength" and "ControlNet" in node.class_type:
            yield _Guess("controlnet_strength", node, place, value)
        elif name == "strength_clip" and node.inputs.get("strength_model") == value:
            yield _Guess("lora_strength", node, place, value)
        elif name in SEEDS and type(value) is int:
            yield _Guess("seed", node, place, value, Kind.SEED)
        elif name in _NAMES and isinstance(value, int | float | str) and name not in SEEDS:
            yield _Guess(_NAMES[name], node, place, value)


def _specs(node: Node, name: str, catalogs: Sequence[Catalog]) -> Iterator[InputSpec]:
    for catalog in catalogs:
        node_class = (catalog.object_info or {}).get(node.class_type)
        if node_class is not None and name in node_class.inputs:
            yield node_class.inputs[name]


def _prompts(graph: Graph) -> Iterator[_Guess]:
    """Texts that become conditioning: the links `positive` and `negative` say which is which, else the title."""
    sides: dict[str, set[str]] = {"positive": set(), "negative": set()}
    for node in graph.values():
        for side, found in sides.items():
            if side in node.links:
                found.update(_sources(graph, node, side))
    for node in graph.values():
        for name in _TEXTS:
            value = node.inputs.get(name)
            if not isinstance(value, str) or not _is_text(node, name):
                continue
            only_negative = node.id in sides["negative"] - sides["positive"]
            negative = only_negative or (
                "negative" in (node.title or "").lower() and node.id not in sides["positive"]
            )
            yield _Guess("negative_prompt" if negative else "prompt", node, Place(node.id, name), value, Kind.STRING)


def _sources(graph: Graph, node: Node, side: str) -> set[str]:
    """All that this side of a sampler is made of; beyond a node with both sides (ControlNet), only this side."""
    found: set[str] = set()
    waiting = [node.links[side].source]
    while waiting:
        node_id = waiting.pop()
        if node_id in found or node_id not in graph:
            continue
        found.add(node_id)
        links = graph[node_id].links
        waiting += [link.source for name, link in links.items() if side not in links or name == side]
    return found


def _is_text(node: Node, name: str) -> bool:
    kind = node.class_type.lower()
    if name in ("value", "string"):
        return "string" in kind or "text" in kind or "prompt" in kind
    return "encode" in kind or "prompt" in kind or "text" in kind


def _like(one: object, other: object) -> bool:
    return one == other and type(one) is type(other)


def _another(guess: _Guess, taken: Mapping[str, Input]) -> str:
    """A name of its own, from the title where there is one."""
    title = _SLUG.sub("_", (guess.node.title or "").lower()).strip("_")[:30].strip("_")
    tail = [_SLUG.sub("_", guess.node.id.lower()).strip("_")[:20] or "x"]
    names = [f"{guess.name}_{end}" for end in ([title] if title else []) + tail]
    names += [f"{guess.name}_{number}" for number in range(2, len(taken) + 3)]
    return next(name[:64] for name in names if name[:64] not in taken)


def _description(guess: _Guess, catalogs: Sequence[Catalog]) -> str:
    words = _WORDS.get(guess.name, "")
    title = guess.node.title
    shown = [
        info[guess.node.class_type].display_name
        for catalog in catalogs
        if (info := catalog.object_info) and guess.node.class_type in info
    ]
    if title and title not in (guess.node.class_type, *shown):
        return f"{title}: {words}" if words else title
    return words


def _place_in_order(item: tuple[str, Input]) -> tuple[int, str]:
    name = item[0]
    for number, known in enumerate(_ORDER):
        if name == known or name.startswith(f"{known}_"):
            return number, name
    return len(_ORDER), name
