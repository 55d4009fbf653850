"""A pretended txt2img chain: no model is loaded; the sampler paints from its seed and writes "simulated" on it.

For the demo and for examples. It must never be mistaken for the work of a model.
"""

import colorsys
import math
import random
from typing import Any

import msgspec
from PIL import Image, ImageDraw, ImageFont

from management_api.simulator.images import jpeg
from management_api.simulator.node import Context, Inputs, Result, node


class Latent(msgspec.Struct, frozen=True):
    """A picture to be, in pixels."""

    width: int
    height: int
    count: int
    pictures: tuple[Any, ...] = ()
    """Painted by the sampler; empty before."""


@node("CheckpointLoaderSimple")
async def checkpoint_loader(_: Context, inputs: Inputs) -> Result:
    """Names instead of models."""
    name = str(inputs["ckpt_name"])
    return Result((name, name, name))


@node("LoraLoader")
async def lora_loader(_: Context, inputs: Inputs) -> Result:
    """The model's name with the LoRA's behind it."""
    mark = f"+{inputs['lora_name']}"
    return Result((f"{inputs['model']}{mark}", f"{inputs['clip']}{mark}"))


@node("CLIPTextEncode")
async def clip_text_encode(_: Context, inputs: Inputs) -> Result:
    """The text itself."""
    return Result((str(inputs["text"]),))


@node("EmptyLatentImage")
async def empty_latent_image(_: Context, inputs: Inputs) -> Result:
    """Only a size and a count."""
    return Result((Latent(int(inputs["width"]), int(inputs["height"]), int(inputs["batch_size"])),))


@node("KSampler")
async def k_sampler(ctx: Context, inputs: Inputs) -> Result:
    """Step by step from noise to a painting that depends on the seed and the texts alone."""
    latent: Latent = inputs["latent_image"]
    steps = int(inputs["steps"])
    small = (max(8, latent.width // 8), max(8, latent.height // 8))
    seeds = [f"{inputs['seed']}/{inputs['positive']}/{index}" for index in range(latent.count)]
    goals = [await ctx.heavy(paint, small, seed) for seed in seeds]
    noise = [_noise(small, seed) for seed in seeds]
    for step in range(1, steps + 1):
        await ctx.sleep(ctx.options.step_seconds)
        picture = None
        if ctx.options.previews:
            shown = Image.blend(noise[0], goals[0], step / steps)
            picture = jpeg(shown.resize((small[0] * 4, small[1] * 4), Image.Resampling.BILINEAR))
        ctx.progress(step, steps, picture)
    return Result((Latent(latent.width, latent.height, latent.count, tuple(goals)),))


@node("VAEDecode")
async def vae_decode(ctx: Context, inputs: Inputs) -> Result:
    """The painting in full size, with its mark."""
    latent: Latent = inputs["samples"]
    size = (latent.width, latent.height)
    pictures = latent.pictures or (Image.new("RGB", (8, 8), (128, 128, 128)),) * latent.count
    return Result((await ctx.heavy(lambda: [_marked(picture, size) for picture in pictures]),))


def _noise(size: tuple[int, int], seed: str) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))  # noqa: S311


def paint(size: tuple[int, int], seed: str) -> Image.Image:
    """Overlapping waves in a palette of three hues, the same for the same seed."""
    dice = random.Random(seed)  # noqa: S311 - a picture, not a secret
    waves = [
        (dice.uniform(-3, 3), dice.uniform(-3, 3), dice.uniform(0, math.tau), dice.uniform(0.5, 1.0))
        for _ in range(6)
    ]
    hue, spread = dice.random(), dice.uniform(0.08, 0.3)
    palette: list[int] = []
    for index in range(256):
        share = index / 255
        rgb = colorsys.hls_to_rgb((hue + spread * share) % 1.0, 0.18 + 0.62 * share, 0.75)
        palette += [round(channel * 255) for channel in rgb]
    width, height = size
    values = bytearray()
    for y in range(height):
        v = y / height * math.tau
        for x in range(width):
            u = x / width * math.tau
            total = sum(a * math.sin(p * u + q * v + t) for p, q, t, a in waves)
            values.append(int(127.5 + 127.5 * math.sin(total)))
    image = Image.frombytes("P", size, bytes(values))
    image.putpalette(palette)
    return image.convert("RGB")


def _marked(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    image = picture.resize(size, Image.Resampling.BICUBIC)
    font = ImageFont.load_default(max(10, size[1] // 24))
    draw = ImageDraw.Draw(image)
    draw.text((size[0] // 32, size[1] - size[1] // 12), "simulated", fill=(255, 255, 255), font=font, stroke_width=1,
              stroke_fill=(0, 0, 0))  # fmt: skip
    return image
