"""The folders of one simulator and the file names in them (PROTOCOL 2 `/view`, 7).

Knows where things lie and what they are called; never opens a picture and never answers a request.
"""

import os
import re
import shutil
import time
from pathlib import Path
from typing import Final

KINDS: Final = ("output", "input", "temp")
MODEL_FOLDERS: Final = (
    "checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "style_models",
    "embeddings", "diffusers", "vae_approx", "controlnet", "gligen", "upscale_models", "custom_nodes",
    "hypernetworks", "photomaker", "classifiers", "model_patches", "audio_encoders",
)  # fmt: skip
PRETENDED: Final = "simulated.safetensors"
_PRETENDED_IN: Final = ("checkpoints", "loras")


class OutsideFolder(Exception):
    """A name that leads out of the folder it belongs to."""


class Folders:
    """The file side of a ComfyUI: output, input, temp and models below one directory."""

    def __init__(self, directory: Path, *, pretend_models: bool) -> None:
        self.root = directory.resolve()
        self._pretend = pretend_models
        shutil.rmtree(self.root / "temp", ignore_errors=True)  # as at each start of the real one
        for kind in KINDS:
            (self.root / kind).mkdir(parents=True, exist_ok=True)
        for folder in ("checkpoints", "loras"):
            (self.root / "models" / folder).mkdir(parents=True, exist_ok=True)

    def of(self, kind: str) -> Path:
        """The folder of one kind. KeyError for an unknown kind."""
        if kind not in KINDS:
            raise KeyError(kind)
        return self.root / kind

    def wipe_temp(self) -> None:
        """Remove the previews, as the real one does at start and at Ctrl-C."""
        shutil.rmtree(self.root / "temp", ignore_errors=True)

    def annotated(self, name: str) -> Path:
        """Where `x.png`, `sub/x.png` or `x.png [output]` lies. Not confined, as recorded (PROTOCOL 7)."""
        base, kind = split_annotation(name)
        return Path(os.path.join(self.of(kind or "input"), base))  # noqa: PTH118 - an absolute name must win

    def inputs(self) -> list[str]:
        """The image files that LoadImage offers, sorted."""
        kinds = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
        return sorted(p.name for p in self.of("input").iterdir() if p.is_file() and p.suffix.lower() in kinds)

    def models(self, folder: str) -> list[str]:
        """File names of one model folder, with sub-folders; the made-up one when it is empty. KeyError: unknown."""
        if folder not in MODEL_FOLDERS:
            raise KeyError(folder)
        base = self.root / "models" / folder
        found = sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()) if base.is_dir() else []
        if not found and self._pretend and folder in _PRETENDED_IN:
            return [PRETENDED]
        return found

    def next_names(self, prefix: str, kind: str, width: int, height: int) -> tuple[Path, str, int, str]:
        """Folder, file name stem, next counter and subfolder for a `filename_prefix`. OutsideFolder if it leaves."""
        prefix = _fill_tokens(prefix, width, height)
        base = self.of(kind)
        subfolder = os.path.dirname(os.path.normpath(prefix))  # noqa: PTH120 - "../x" must stay readable as text
        stem = os.path.basename(os.path.normpath(prefix))  # noqa: PTH119
        folder = Path(os.path.abspath(os.path.join(base, subfolder)))  # noqa: PTH100, PTH118
        common = os.path.commonpath((base, folder))
        if common != str(base):
            raise OutsideFolder(
                "**** ERROR: Saving image outside the output folder is not allowed.\n"
                f" full_output_folder: {folder}\n         output_dir: {base}\n         commonpath: {common}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(re.escape(stem) + r"_(\d+)_")
        last = 0
        for name in os.listdir(folder):  # noqa: PTH208 - names only, and many of them
            if name.startswith(stem) and (match := pattern.match(name)):
                last = max(last, int(match[1]))
        return folder, stem, last + 1, subfolder


def split_annotation(name: str) -> tuple[str, str | None]:
    """`x.png [output]` -> (`x.png`, `output`); without a mark the kind is None."""
    for kind in KINDS:
        if name.endswith(f" [{kind}]"):
            return name.removesuffix(f" [{kind}]"), kind
    return name, None


def _fill_tokens(prefix: str, width: int, height: int) -> str:
    if "%" not in prefix:
        return prefix
    now = time.localtime()
    values = {
        "width": str(width), "height": str(height), "year": str(now.tm_year), "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}", "hour": f"{now.tm_hour:02}", "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}", "date": time.strftime("%Y-%m-%d", now),
    }  # fmt: skip
    for token, value in values.items():
        prefix = prefix.replace(f"%{token}%", value)
    return prefix
