"""docs/generate.md says what the program does: its examples are run, in their order, as those of the API are."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from tests.test_docs import ROOT, fences, player

DOCUMENT = ROOT / "docs" / "generate.md"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are curl lines, and there is no curl")
def test_every_example_gives_the_reply_that_is_shown(tmp_path: Path) -> None:
    examples = fences(DOCUMENT.read_text())
    commands = [fence for fence in examples if fence.language == "bash"]
    assert len(commands) > 8
    with player(tmp_path) as reader:
        graph = resources.files("management_api.commands").joinpath("txt2img.json").read_bytes()
        (reader.folder / "workflow.json").write_bytes(graph)
        for n, fence in enumerate(commands):
            wrong = reader.play(fence)
            assert not wrong, f"{DOCUMENT.name}:{fence.line}: " + "\n".join(wrong)
            if n == 4:
                with Image.open(reader.folder / "picture.png") as image:
                    assert (image.format, image.size) == ("PNG", (768, 512)), "after five commands"
