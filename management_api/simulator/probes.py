"""The probe nodes the recordings were made with: sleeping, failing, expanding, blocking (workflows/README).

They do exactly what their names say and exist for tests and benchmarks; no workflow of a user needs them.
"""

import asyncio
import io
import os
import random
from typing import Any

from PIL import Image, ImageDraw

from management_api.simulator.images import jpeg
from management_api.simulator.node import Blocked, Context, Inputs, NodeFailure, Result, node
from management_api.simulator.sockets import Picture

_OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB (simulated)"


def _fail(kind: str, step: int) -> None:
    if kind == "value_error":
        raise ValueError(f"deliberate failure at step {step}")
    if kind == "oom":
        raise NodeFailure("/comfyui/custom_nodes/steps_probe.FakeOutOfMemory", _OUT_OF_MEMORY)
    if kind == "torch_oom":
        raise NodeFailure("torch.OutOfMemoryError", _OUT_OF_MEMORY)
    if kind == "hard_exit":
        os._exit(137)


def _bar(step: int, steps: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), (40, 40, 40))
    ImageDraw.Draw(image).rectangle((0, 24, round(64 * step / steps), 40), fill=(220, 120, 40))
    return image


@node("SleepSteps")
async def sleep_steps(ctx: Context, inputs: Inputs) -> Result:
    """Sleep step by step, with progress and JPEG previews; fails where it is told to."""
    steps = int(inputs["steps"])
    for step in range(1, steps + 1):
        await ctx.sleep(float(inputs["seconds_per_step"]))
        ctx.progress(step, steps, jpeg(_bar(step, steps)) if inputs["preview"] else None)
        if step == int(inputs["fail_at_step"]):
            _fail(inputs["fail"], step)
    return Result((inputs["image"],))


@node("SleepDeaf")
async def sleep_deaf(_: Context, inputs: Inputs) -> Result:
    """Sleep without looking at the interrupt flag."""
    await asyncio.sleep(float(inputs["seconds"]))
    return Result((inputs["image"],))


@node("AsyncSleep", concurrent=True)
async def async_sleep(_: Context, inputs: Inputs) -> Result:
    """Sleep while other nodes run."""
    await asyncio.sleep(float(inputs["seconds"]))
    return Result((inputs["image"],))


@node("ProbeText")
async def probe_text(ctx: Context, inputs: Inputs) -> Result:
    """A text as output and as a binary frame on the way."""
    text = str(inputs["text"])
    ctx.text(f"working on: {text}")
    return Result((text,), {"text": [text]})


@node("ProbeExpand")
async def probe_expand(ctx: Context, inputs: Inputs) -> Result:
    """Becomes two nodes: a short sleep and an inversion."""
    prefix = f"{ctx.node_id}.0.0."
    sleep: dict[str, Any] = {
        "image": inputs["image"], "steps": 2, "seconds_per_step": 0.05, "seed": inputs["seed"],
        "preview": False, "fail": "none", "fail_at_step": 0,
    }  # fmt: skip
    return Result(
        ([f"{prefix}2", 0],),
        expand={
            f"{prefix}1": {"class_type": "SleepSteps", "inputs": sleep},
            f"{prefix}2": {"class_type": "ImageInvert", "inputs": {"image": [f"{prefix}1", 0]}},
        },
    )


@node("ProbeBlock")
async def probe_block(_: Context, inputs: Inputs) -> Result:
    """Hands on the picture, or a blocker with a message."""
    return Result((Blocked(inputs["message"]) if inputs["block"] else inputs["image"],))


@node("ProbeNeverCached", fingerprint=lambda *_: str(random.random()))  # noqa: S311
async def probe_never_cached(_: Context, inputs: Inputs) -> Result:
    """The picture, computed anew each time."""
    return Result((inputs["image"],))


@node("PreviewFlood")
async def preview_flood(ctx: Context, inputs: Inputs) -> Result:
    """Previews of noise as fast as they can be made."""
    frames, size = int(inputs["frames"]), int(inputs["size"])

    def noise(seed: int) -> Picture:
        pixels = random.Random(seed).randbytes(size * size * 3)  # noqa: S311 - noise for a picture
        buffer = io.BytesIO()
        Image.frombytes("RGB", (size, size), pixels).save(buffer, "PNG", compress_level=1)
        return Picture("PNG", buffer.getvalue())

    for frame in range(1, frames + 1):
        ctx.progress(frame, frames, await ctx.heavy(noise, int(inputs["seed"]) + frame))
    return Result((inputs["image"],))
