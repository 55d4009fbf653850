"""Plain names and messages for nodes, and how much of a run's time they are likely to take.

Knows core classes by a small table and all others by the words in their names, so a custom node gets a fair name too.
Must never decide anything but wording and weight.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import inf, isfinite
from typing import Literal

Category = Literal["loader", "sampler", "encode", "decode", "save", "load", "upscale", "control", "other"]

# Names that neither /object_info nor the words of the class would give.
_NAMES = {
    "KSampler": "K-Sampler",
    "KSamplerAdvanced": "K-Sampler (advanced)",
    "KSamplerSelect": "Choose sampler",
    "SamplerCustom": "Custom sampler",
    "SamplerCustomAdvanced": "Custom sampler (advanced)",
    "CheckpointLoaderSimple": "Load checkpoint",
    "CheckpointLoader": "Load checkpoint",
    "ImageOnlyCheckpointLoader": "Load image checkpoint",
    "unCLIPCheckpointLoader": "Load unCLIP checkpoint",
    "UNETLoader": "Load diffusion model",
    "VAELoader": "Load VAE",
    "LoraLoader": "Load LoRA",
    "LoraLoaderModelOnly": "Load LoRA",
    "CLIPLoader": "Load text encoder",
    "DualCLIPLoader": "Load text encoders",
    "TripleCLIPLoader": "Load text encoders",
    "QuadrupleCLIPLoader": "Load text encoders",
    "CLIPVisionLoader": "Load CLIP vision",
    "ControlNetLoader": "Load ControlNet",
    "UpscaleModelLoader": "Load upscale model",
    "CLIPTextEncode": "Encode text prompt",
    "CLIPTextEncodeFlux": "Encode text prompt (Flux)",
    "CLIPTextEncodeSD3": "Encode text prompt (SD3)",
    "CLIPTextEncodeSDXL": "Encode text prompt (SDXL)",
    "CLIPVisionEncode": "Encode image (CLIP vision)",
    "VAEEncode": "Encode image (VAE)",
    "VAEDecode": "Decode image (VAE)",
    "VAEDecodeAudio": "Decode audio (VAE)",
    "ControlNetApply": "Apply ControlNet",
    "ControlNetApplyAdvanced": "Apply ControlNet",
    "ControlNetApplySD3": "Apply ControlNet (SD3)",
    "ImageUpscaleWithModel": "Upscale image (model)",
    "ImageScale": "Scale image",
    "ImageScaleBy": "Scale image",
    "EmptyLatentImage": "Empty latent",
    "EmptySD3LatentImage": "Empty latent (SD3)",
    "SaveAnimatedWEBP": "Save animation (WebP)",
    "SaveAnimatedPNG": "Save animation (PNG)",
    "SaveWEBM": "Save video (WebM)",
    "SaveImageWebsocket": "Send image",
    "VHS_VideoCombine": "Combine video",
}

# The first that matches decides.
_RULES: tuple[tuple[str, Category], ...] = (
    (r"Select|Scheduler|^Sampler(?!Custom)", "other"),  # choose how to sample, but do not
    (
        r"^(?:Save|Preview)|Save$|(?:Mask|Image|Audio|Video)Preview$|Save(?:Image|Video|Audio)|VideoCombine|^LossGraph",
        "save",
    ),
    (r"KSampler|SamplerCustom|Sampler(?:$|Advanced|Tiled)|UltimateSDUpscale|Detailer|^Train", "sampler"),
    (r"[Ll]oader", "loader"),
    (r"(?:^|_)(?:Load|Record)(?=[A-Z0-9])|^Webcam", "load"),
    (r"^(?:Empty|Conditioning|ModelSampling)", "other"),
    (r"Decode", "decode"),
    (r"Encode", "encode"),
    (r"Control[Nn]et|IPAdapter|T2IAdapter|Preprocessor|^Canny$", "control"),
    (r"Upscale(?!_Conditioning)|FrameInterpolat|RIFE|ESRGAN|SUPIR", "upscale"),
)
_PATTERNS = tuple((re.compile(rule), kind) for rule, kind in _RULES)

_WEIGHTS: dict[Category, float] = {
    "sampler": 20.0,
    "upscale": 6.0,
    "loader": 4.0,
    "decode": 2.0,
    "control": 2.0,
    "encode": 1.0,
    "save": 1.0,
    "load": 0.5,
    "other": 0.5,
}
_HEAVY = re.compile(r"UltimateSDUpscale|^Train|SUPIR|RIFE|VideoSampler")
_TRIVIAL = re.compile(
    r"^(?:Empty|Primitive|String|Regex|Conditioning|KSamplerSelect|BasicGuider|CFGGuider|FluxGuidance|RandomNoise"
    r"|ModelSampling|Reroute|Latent|SetLatent|GetImageSize|ImageScale|Sampler(?!Custom))|Scheduler$|Sigmas"
)

_LOADED = (
    ("Lora", "LoRA"),
    ("LoRA", "LoRA"),
    ("Control", "ControlNet"),
    ("CLIPVision", "CLIP vision model"),
    ("Checkpoint", "checkpoint"),
    ("VAE", "VAE"),
    ("CLIP", "text encoder"),
    ("Upscale", "upscale model"),
    ("StyleModel", "style model"),
    ("UNET", "diffusion model"),
    ("Unet", "diffusion model"),
    ("Diffus", "diffusion model"),
    ("IPAdapter", "IP-Adapter"),
)
_MEDIA = (
    ("Audio", "audio"),
    ("Video", "video"),
    ("WEBM", "video"),
    ("Animated", "animation"),
    ("3[Dd]|GLB|Mesh", "3D model"),
    ("Mask", "mask"),
    ("SVG", "drawing"),
    ("Checkpoint|Model|CLIP(?!Vision)|VAESave|[Ll]ora|LoRA", "model"),
    ("Any|Text|String", "text"),
    ("Latent$", "latent"),
)

_WORDS = re.compile(
    r"Control[Nn]et|UNet|DiT|HiDream|HuMo|FreeU|LoRA|PixArt|\d?3Dv?\d*|[A-Z]+(?![a-z])(?:\d+(?![\dBD]))?|[A-Z]?[a-z]+(?:\d+(?![\dBD]))?|\d+[A-Z]?|[^\W_]+"
)
_PUNCTUATION = re.compile(r"[\W_]+")


@lru_cache(maxsize=4096)
def category(class_type: str) -> Category:
    """What kind of work a class does, by its name."""
    return next((kind for pattern, kind in _PATTERNS if pattern.search(class_type)), "other")


@lru_cache(maxsize=4096)
def weight(class_type: str) -> float:
    """The cost of a node relative to others, for the overall progress; above 0. Encoding a text is about 1."""
    if _HEAVY.search(class_type):
        return 30.0
    if category(class_type) in ("other", "upscale") and _TRIVIAL.search(class_type):
        return 0.1
    return _WEIGHTS[category(class_type)]


def node_name(class_type: str, title: str | None = None, display_name: str | None = None) -> str:
    """What to call a node: its own title, our plain word, ComfyUI's display name, or the words of the class.

    ComfyUI's editor writes a title on every node; one that only repeats the class or its display name says nothing.
    """
    if title and _fold(title) not in (_fold(class_type), _fold(display_name or "")):
        return title
    if class_type in _NAMES:
        return _NAMES[class_type]
    if display_name and display_name != class_type:
        return display_name
    return split_words(class_type)


def split_words(class_type: str) -> str:
    """`ImageColorToMask` -> `Image Color To Mask`; abbreviations stay whole."""
    return " ".join(_WORDS.findall(class_type)) or class_type


def message(class_type: str, name: str, step: float | None = None, steps: float | None = None) -> str:
    """What is going on, for people: `Generating image using K-Sampler: 15/20 steps (75%)`, `Loading checkpoint…`.

    A single step is no progress to speak of (ComfyUI says 0/1 of nodes that count none), so it is left out.
    """
    kind = category(class_type)
    doing = _doing(class_type, kind, name)
    if step is None or steps is None or not (isfinite(step) and 1 < steps < inf):
        return f"{doing}…"
    done = min(max(step, 0), steps)
    unit = " steps" if kind == "sampler" else ""
    return f"{doing}: {done:.0f}/{steps:.0f}{unit} ({int(100 * done / steps)}%)"


def _doing(class_type: str, kind: Category, name: str) -> str:
    match kind:
        case "sampler":
            return f"Training using {name}" if class_type.startswith("Train") else f"Generating image using {name}"
        case "loader":
            return f"Loading {next((thing for word, thing in _LOADED if word in class_type), 'model')}"
        case "load":
            return f"Loading {_medium(class_type)}"
        case "save":
            medium = _medium(class_type)
            return f"Preparing {medium} preview" if "Preview" in class_type else f"Saving {medium}"
        case "decode":
            return f"Decoding {_medium(class_type.removeprefix('VAE'))}"
        case "encode" if "Text" in class_type:
            return "Encoding text prompt"
        case "encode":
            return f"Encoding {_medium(class_type.removeprefix('VAE'))}"
        case "upscale" if class_type.startswith("Image"):
            return "Upscaling image"
        case "control" if "Apply" in class_type and "ontrol" in class_type:
            return "Applying ControlNet"
    return f"Running {name}"


@lru_cache(maxsize=4096)
def _medium(class_type: str) -> str:
    return next((thing for pattern, thing in _MEDIA if re.search(pattern, class_type)), "image")


def _fold(text: str) -> str:
    return _PUNCTUATION.sub("", text).casefold()
