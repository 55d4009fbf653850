"""The recorded conversations with a real ComfyUI (tests/data/transcripts), as tests want them."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from managers.comfyui.protocol import Message, PreviewFrame, TextFrame, decode_binary, decode_text

DATA = Path(__file__).parent / "data"


def lines(case: str) -> Iterator[dict[str, Any]]:
    with (DATA / "transcripts" / f"{case}.jsonl").open() as file:
        for line in file:
            yield json.loads(line)


def cases() -> list[str]:
    return sorted(path.stem for path in (DATA / "transcripts").glob("*.jsonl"))


def frames(case: str, conn: str | None = None) -> Iterator[Message | PreviewFrame | TextFrame]:
    """Every frame the client received, decoded by us."""
    for line in lines(case):
        if line["dir"] != "ws-in" or (conn and line["conn"] != conn):
            continue
        if line["frame"] == "text":
            decoded: Any = decode_text(json.dumps(line["message"]))
        else:
            text = line["base64"].partition("...")[0]  # very large pictures were cut when recording
            decoded = decode_binary(base64.b64decode(text[: len(text) // 4 * 4]))
        assert decoded is not None, line
        yield decoded


def prompts(case: str) -> dict[str, dict[str, Any]]:
    """The graphs of the accepted prompts, by prompt_id."""
    asked: dict[int, Any] = {}
    accepted: dict[str, dict[str, Any]] = {}
    for line in lines(case):
        if line["dir"] == "http-request" and line["path"] == "/prompt" and line["method"] == "POST":
            asked[line["id"]] = line.get("body")
        if line["dir"] == "http-response" and line.get("status") == 200 and line["id"] in asked:
            accepted[line["body"]["prompt_id"]] = asked[line["id"]]["prompt"]
    return accepted


def histories(case: str) -> dict[str, dict[str, Any]]:
    """The last history entry recorded of each prompt."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines(case):
        if line["dir"] == "http-response" and line["path"].startswith("/history/") and isinstance(line["body"], dict):
            found |= line["body"]
    return found
