"""ComfyUI's own refusals, and its texts without the paths of its machine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from managers.comfyui.rejection import findings_from_rejection, scrub
from managers.events.types import Finding
from tests.graphs import (
    recorded_prompts,
)
from tests.recordings import DATA


def test_a_recorded_refusal_keeps_what_was_allowed() -> None:
    answers = {
        case: answer for case, _, status, answer in recorded_prompts() if case.startswith("reject_") and status == 400
    }
    (finding,) = findings_from_rejection(answers["reject_out_of_range"])
    assert finding == Finding(
        code="value_bigger_than_max",
        message="EmptyImage (1): Value 999999 bigger than max of 16384: width",
        pointer="/workflow/1/inputs/width",
        node_id="1",
        class_type="EmptyImage",
        input="width",
        allowed={"min": 1, "max": 16384},
    )
    (finding,) = findings_from_rejection(answers["reject_node_type"])
    assert (finding.code, finding.node_id, finding.class_type) == ("missing_node_type", "2", "NoSuchNodeClass")
    (finding,) = findings_from_rejection(answers["reject_missing_class_type"])
    assert (finding.code, finding.pointer) == ("class_type_missing", "/workflow/1")
    (finding,) = findings_from_rejection(answers["reject_cycle"])
    assert "circle" in finding.message
    (finding,) = findings_from_rejection(answers["reject_bad_link"])
    assert "/comfyui" not in repr(finding)


def test_a_newer_refusal_names_the_node() -> None:
    extra = {"node_id": "4", "class_type": "Fancy", "node_title": "My node"}
    body = {"error": {"type": "missing_node_type", "message": "Node 'Fancy' not found.", "extra_info": extra}}
    (finding,) = findings_from_rejection(body)
    assert (finding.code, finding.node_id, finding.class_type) == ("missing_node_type", "4", "Fancy")


@pytest.mark.parametrize(
    "body", [None, "500 Internal Server Error", {}, {"error": "nope"}, {"node_errors": {"1": {}}}]
)
def test_an_answer_of_another_kind_is_one_finding(body: object) -> None:
    (finding,) = findings_from_rejection(body)
    assert finding.code == "rejected"
    assert finding.message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("No such file: '/home/eve/ComfyUI/input/a b.png'", "No such file: '…/a b.png'"),
        ("cannot open /srv/models/x.safetensors, sorry", "cannot open …/x.safetensors, sorry"),
        ("output_dir: /comfyui-data/output\ncommonpath: /\n", "output_dir: …\ncommonpath: /"),
        ("in C:\\Users\\Eve Smith\\ComfyUI\\main.py line 3", "in …/main.py line 3"),
        ("at D:/ai/custom_nodes", "at …"),
        ("see file:///home/eve/x.json or \\\\nas\\share\\y.png", "see …/x.json or …/y.png"),
        ("~/ComfyUI/extra.yaml", "…/extra.yaml"),
        ("/root/.cache", "…"),
        ("module /srv/custom_nodes/pack.MyError", "module …/pack.MyError"),
        ("mat1 and mat2 (1/2 and 3 / 4), image/png, and/or", "mat1 and mat2 (1/2 and 3 / 4), image/png, and/or"),
        ("get it at https://example.org/models/x.ckpt", "get it at https://example.org/models/x.ckpt"),
        (
            'Traceback (most recent call last):\n  File "/a/b.py", line 1, in f\n    raise X\nValueError: bad\n',
            "ValueError: bad",
        ),
        ('oops\n  File "/comfyui/execution.py", line 496, in execute\n    ...\n', "oops"),
    ],
)
def test_scrub(text: str, shown: str) -> None:
    assert scrub(text) == shown


def test_what_comfyui_said_of_the_recorded_failures_leaves_no_path() -> None:
    seen = 0
    for path in (DATA / "transcripts").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            message = json.loads(line).get("message", {})
            if isinstance(message, dict) and message.get("type") == "execution_error":
                data = message["data"]
                for text in (data["exception_message"], data["exception_type"], "".join(data["traceback"])):
                    assert "/comfyui" not in scrub(text)
                    assert "/abs" not in scrub(text)
                seen += 1
    assert seen >= 5


# --- Any input


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_any_answer_of_a_backend_is_understood(body: Any) -> None:
    for answer in (body, {"error": body, "node_errors": {"1": body}}, {"node_errors": {"1": {"errors": [body]}}}):
        assert findings_from_rejection(answer)


PART = st.text(st.characters(categories=["Ll", "Nd"], include_characters="-_"), min_size=1, max_size=12)


@given(
    st.lists(PART, min_size=1, max_size=5),
    PART,
    st.sampled_from(["{}", "at {} now", "'{}'", '"{}":', "({})", "x={}"]),
)
def test_no_folder_survives_scrub(folders: list[str], name: str, frame: str) -> None:
    secret = "zq".join(("", *folders, ""))
    for root, separator in (("/", "/"), ("C:\\", "\\"), ("\\\\", "\\")):
        path = root + separator.join([secret, *folders, f"{name}.png"])
        cleaned = scrub(frame.format(path))
        assert secret not in cleaned
        assert f"…/{name}.png" in cleaned


@given(st.text())
def test_scrub_takes_any_text(text: str) -> None:
    assert isinstance(scrub(text), str)
