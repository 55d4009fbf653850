"""The core nodes on pictures and texts, done for real with Pillow, and the saving of files (PROTOCOL 4, 7)."""

import hashlib
import io
import json
import random
import string
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageChops, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from management_api.simulator.folders import Folders, OutsideFolder
from management_api.simulator.node import Batch, Context, Inputs, NodeFailure, Result, node
from management_api.simulator.sockets import Picture

_RESAMPLING: Final = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def jpeg(image: Image.Image, longest_side: int = 512) -> Picture:
    """A preview picture, made smaller where it is too large."""
    small = image
    if max(image.size) > longest_side:
        small = image.copy()
        small.thumbnail((longest_side, longest_side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=95)
    return Picture("JPEG", buffer.getvalue())


@node("EmptyImage")
async def empty_image(_: Context, inputs: Inputs) -> Result:
    """One colour, `color` is 0xRRGGBB."""
    colour = int(inputs["color"])
    rgb = (colour >> 16 & 255, colour >> 8 & 255, colour & 255)
    image = Image.new("RGB", (int(inputs["width"]), int(inputs["height"])), rgb)
    return Result(([image] * int(inputs["batch_size"]),))


def _file_of(folders: Folders, inputs: Inputs) -> Path:
    return folders.annotated(str(inputs["image"]))


def _file_digest(folders: Folders, inputs: Inputs) -> str:
    path = _file_of(folders, inputs)
    return hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""


def _file_missing(folders: Folders, inputs: Inputs) -> tuple[str, str] | None:
    if isinstance(inputs["image"], list) or _file_of(folders, inputs).exists():
        return None
    return "image", f"Invalid image file: {inputs['image']}"


@node("LoadImage", fingerprint=_file_digest, validate=_file_missing)
async def load_image(ctx: Context, inputs: Inputs) -> Result:
    """A picture from the input folder (or where the name says), all frames of it."""

    def load() -> tuple[Batch, Batch]:
        with Image.open(_file_of(ctx.folders, inputs)) as file:
            frames = [ImageOps.exif_transpose(frame).convert("RGBA") for frame in ImageSequence.Iterator(file)]
        masks = [ImageChops.invert(frame.getchannel("A")) for frame in frames]
        return [frame.convert("RGB") for frame in frames], masks

    return Result(await ctx.heavy(load))


@node("ImageScale")
async def image_scale(ctx: Context, inputs: Inputs) -> Result:
    """Scale to width x height; 0 keeps the proportions; `crop` may be `center`."""

    def scale(image: Image.Image) -> Image.Image:
        width, height = int(inputs["width"]), int(inputs["height"])
        if width == 0 and height == 0:
            return image
        width = width or max(1, round(image.width * height / image.height))
        height = height or max(1, round(image.height * width / image.width))
        method = _RESAMPLING[inputs["upscale_method"]]
        if inputs["crop"] == "center":
            return ImageOps.fit(image, (width, height), method)
        return image.resize((width, height), method)

    return Result((await ctx.heavy(lambda: [scale(image) for image in inputs["image"]]),))


@node("ImageInvert")
async def image_invert(ctx: Context, inputs: Inputs) -> Result:
    """255 minus every channel."""
    return Result((await ctx.heavy(lambda: [ImageOps.invert(image) for image in inputs["image"]]),))


@node("ImageBlend")
async def image_blend(ctx: Context, inputs: Inputs) -> Result:
    """Mix two batches; the second is scaled to the size of the first."""
    modes = {
        "normal": lambda _, b: b,
        "multiply": ImageChops.multiply,
        "screen": ImageChops.screen,
        "overlay": ImageChops.overlay,
        "soft_light": ImageChops.soft_light,
        "difference": ImageChops.difference,
    }

    def blend(one: Image.Image, other: Image.Image) -> Image.Image:
        other = other if other.size == one.size else other.resize(one.size, Image.Resampling.BICUBIC)
        return Image.blend(one, modes[inputs["blend_mode"]](one, other), float(inputs["blend_factor"]))

    pairs = list(zip(inputs["image1"], inputs["image2"], strict=False))
    return Result((await ctx.heavy(lambda: [blend(a, b) for a, b in pairs]),))


@node("ImageBatch")
async def image_batch(_: Context, inputs: Inputs) -> Result:
    """The first batch, then the second scaled to the same size."""
    first: Batch = inputs["image1"]
    size = first[0].size
    second = [im if im.size == size else ImageOps.fit(im, size) for im in inputs["image2"]]
    return Result((first + second,))


@node("RepeatImageBatch")
async def repeat_image_batch(_: Context, inputs: Inputs) -> Result:
    """The batch `amount` times over."""
    return Result((inputs["image"] * int(inputs["amount"]),))


def _metadata(ctx: Context) -> PngInfo:
    info = PngInfo()
    info.add_text("prompt", json.dumps(ctx.prompt))
    if isinstance(ctx.extra_pnginfo, dict):
        for key, value in ctx.extra_pnginfo.items():
            info.add_text(key, json.dumps(value))
    return info


def _save(ctx: Context, images: Batch, prefix: str, kind: str, compress_level: int) -> Result:
    try:
        folder, stem, counter, subfolder = ctx.folders.next_names(prefix, kind, *images[0].size)
    except OutsideFolder as error:
        raise NodeFailure("Exception", str(error)) from error
    info = _metadata(ctx)
    saved = []
    for index, image in enumerate(images):
        name = f"{stem.replace('%batch_num%', str(index))}_{counter + index:05}_.png"
        image.save(folder / name, pnginfo=info, compress_level=compress_level)
        saved.append({"filename": name, "subfolder": subfolder, "type": kind})
    return Result(ui={"images": saved})


@node("SaveImage")
async def save_image(ctx: Context, inputs: Inputs) -> Result:
    """PNG files below `output`, with the prompt inside. Exception when the prefix leads outside."""
    return await ctx.heavy(_save, ctx, inputs["images"], inputs["filename_prefix"], "output", 4)


@node("PreviewImage")
async def preview_image(ctx: Context, inputs: Inputs) -> Result:
    """PNG files below `temp`."""
    letters = "".join(random.choices(string.ascii_lowercase, k=5))  # noqa: S311 - a name, not a secret
    return await ctx.heavy(_save, ctx, inputs["images"], f"ComfyUI_temp_{letters}", "temp", 1)


@node("SaveImageWebsocket")
async def save_image_websocket(ctx: Context, inputs: Inputs) -> Result:
    """Pictures that exist only as binary frames."""
    for index, image in enumerate(inputs["images"]):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        ctx.progress(index, len(inputs["images"]), Picture("PNG", buffer.getvalue()))
    return Result()


@node("PrimitiveString")
async def primitive_string(_: Context, inputs: Inputs) -> Result:
    """A text, handed on."""
    return Result((str(inputs["value"]),))


@node("PreviewAny")
async def preview_any(_: Context, inputs: Inputs) -> Result:
    """Whatever it is given, as text."""
    source: Any = inputs["source"]
    text = source if isinstance(source, str) else json.dumps(source, default=str)
    return Result(ui={"text": [text]})
