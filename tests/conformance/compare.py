"""Compares a replay with its recording: order and shape, not clocks, counters and sizes.

Each function gives a list of differences in words; empty means alike.
"""

import base64
import json
import re
from typing import Any

from msgspec import UNSET

from tests.conformance.player import Answer, Played
from tests.conformance.recording import Event, Frame, frame_of, frames, submissions

_COUNTER = re.compile(r"_\d{5}_")
_TEMP_NAME = re.compile(r"temp_[a-z]{5}_")
_PATH = re.compile(r"(/[\w.\-]+)+/?|(?<=: )/")
_UNORDERED = {"executed", "current_outputs", "nodes", "dependent_outputs"}
_ANY_TEXT = {"tooltip", "description", "sid", "python_version", "pytorch_version", "required_frontend_version"} | {
    "required_templates_version", "os", "comfyui_version", "output_tooltips", "argv", "traceback", "display_name",
}  # fmt: skip
_ANY_NUMBER = {"timestamp", "ram_total", "ram_free", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"}
_WORDS = {"exception_message", "details", "exception_type", "message"}
_ELIDED = "..."
Timed = set[str]


def differences(events: list[Event], played: Played, *, loosely: bool, unread: set[int]) -> list[str]:
    """All that differs. `loosely`: only the order of the main events counts; `unread`: bodies not compared."""
    found = []
    for event in events:
        if event.dir == "http-response":
            where = f"answer {event.id} {event.method} {event.path}"
            skip_body = loosely or event.id in unread
            found += [f"{where}: {text}" for text in _answer(event, played.answers[event.id], skip_body=skip_body)]
    for name in dict.fromkeys(event.conn for event in events if event.dir == "ws-open"):
        found += [f"socket {name}: {text}" for text in _socket(events, name, played.frames[name], loosely=loosely)]
        codes = [event.code for event in events if event.dir == "ws-close" and event.conn == name]
        if codes and codes[0] != played.close_codes[name]:
            found.append(f"socket {name}: closed with {played.close_codes[name]}, recorded {codes[0]}")
    return found


def _answer(recorded: Event, answer: Answer, *, skip_body: bool) -> list[str]:
    if recorded.error:
        return [] if answer.error else [f"status {answer.status} where the connection failed"]
    found = []
    for what, theirs, ours in (
        ("status", recorded.status, answer.status),
        ("content type", recorded.content_type, answer.content_type),
        ("disposition", _masked(recorded.content_disposition), _masked(answer.content_disposition)),
    ):
        if theirs != ours:
            found.append(f"{what} {ours!r}, recorded {theirs!r} ({answer.error or answer.content[:200]!r})")
    if found or skip_body:
        return found
    if recorded.body is not UNSET:
        return agree(recorded.body, json.loads(answer.content), "body")
    if recorded.body_text is not None:
        return [] if recorded.body_text == answer.content.decode() else [f"text {answer.content[:200]!r}"]
    if recorded.body_base64 is not None:
        start = base64.b64decode(recorded.body_base64)[:8]
        return [] if answer.content.startswith(start[:3]) else [f"begins with {answer.content[:8]!r}"]
    return [] if not answer.content or recorded.method == "HEAD" else [f"a body: {answer.content[:80]!r}"]


def agree(theirs: Any, ours: Any, where: str) -> list[str]:
    """Differences between a recorded and a received JSON value; the place decides how closely it is looked at."""
    key = where.rpartition(".")[2].partition("[")[0]
    if theirs == _ELIDED:
        return []
    if key in _ANY_TEXT:
        return [] if type(theirs) is type(ours) or None in (theirs, ours) else [f"{where}: {ours!r} for {theirs!r}"]
    if isinstance(theirs, bool) or theirs is None or isinstance(ours, bool) or ours is None:
        return [] if theirs is ours else [f"{where}: {ours!r}, recorded {theirs!r}"]
    if isinstance(theirs, int | float) and isinstance(ours, int | float):
        counted = key in _ANY_NUMBER or key == "number" or _is_number_of_item(where)
        return [] if counted or theirs == ours else [f"{where}: {ours!r}, recorded {theirs!r}"]
    if isinstance(theirs, str) and isinstance(ours, str):
        return _texts(theirs, ours, where, key)
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return _objects(theirs, ours, where, key)
    if isinstance(theirs, list) and isinstance(ours, list):
        return _lists(theirs, ours, where, key)
    return [f"{where}: {type(ours).__name__}, recorded {type(theirs).__name__}"]


def _is_number_of_item(where: str) -> bool:
    """The first element of a queue item: [number, id, prompt, extra_data, outputs]."""
    return bool(re.search(r"(queue_running|queue_pending)\[\d+\]\[0\]$|\.prompt\[0\]$", where))


def _texts(theirs: str, ours: str, where: str, key: str) -> list[str]:
    if key in _WORDS:
        theirs, ours = (_PATH.sub("<path>", _masked(text)) for text in (theirs, ours))
    return [] if _masked(theirs) == _masked(ours) else [f"{where}: {ours!r}, recorded {theirs!r}"]


def _objects(theirs: dict[str, Any], ours: dict[str, Any], where: str, key: str) -> list[str]:
    if _ELIDED in theirs:  # the recorder kept only some of it
        theirs = {name: value for name, value in theirs.items() if name != _ELIDED}
        ours = {name: value for name, value in ours.items() if name in theirs}
    if theirs.keys() != ours.keys():
        missing, more = theirs.keys() - ours.keys(), ours.keys() - theirs.keys()
        return [f"{where}: lacks {sorted(missing)}, has {sorted(more)} besides"]
    if key == "current_inputs":
        return []
    return [text for name in theirs for text in agree(theirs[name], ours[name], f"{where}.{name}")]


def _lists(theirs: list[Any], ours: list[Any], where: str, key: str) -> list[str]:
    if key in _UNORDERED or re.search(r"(queue_running|queue_pending)\[\d+\]\[4\]$|\.prompt\[4\]$", where):
        theirs, ours = sorted(theirs), sorted(ours)
    if re.search(r"required\.image\[0\]$", where):  # the files that lie in the input folder
        return [] if all(isinstance(name, str) for name in ours) else [f"{where}: {ours!r}"]
    if len(theirs) != len(ours):
        return [f"{where}: {len(ours)} items, recorded {len(theirs)}"]
    return [text for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) for text in agree(a, b, f"{where}[{i}]")]


def _masked(text: str) -> str:
    return _TEMP_NAME.sub("temp_#_", _COUNTER.sub("_#_", re.sub(r"\d{4}-\d\d-\d\d", "<date>", text)))


# Sockets --------------------------------------------------------------------------------------------------------


def _socket(events: list[Event], name: str, heard: list[Frame], *, loosely: bool) -> list[str]:
    recorded = frames(events, name)
    theirs, ours = _skeleton(recorded, loosely=loosely), _skeleton(heard, loosely=loosely)
    if [kind for kind, _ in theirs] != [kind for kind, _ in ours]:
        return [f"heard {[kind for kind, _ in ours]}, recorded {[kind for kind, _ in theirs]}"]
    if loosely:
        return []
    found = [text for (kind, a), (_, b) in zip(theirs, ours, strict=True) for text in agree(a, b, kind)]
    if (a := _counts(recorded)) != (b := _counts(heard)):
        found.append(f"queue_remaining went {b}, recorded {a}")
    timed = _timed(events, recorded)
    nodes, our_nodes = _by_node(recorded, timed), _by_node(heard, timed)
    if nodes.keys() != our_nodes.keys():
        return [*found, f"nodes {sorted(our_nodes)}, recorded {sorted(nodes)}"]
    for key, value in nodes.items():
        found += agree(value, our_nodes[key], f"node {key[1]}")
    return found


def _skeleton(heard: list[Frame], *, loosely: bool) -> list[tuple[str, Any]]:
    """The frames that belong to no node; of the `status` frames the greeting and those right after a verdict."""
    kept: list[tuple[str, Any]] = []
    after_verdict = False
    for frame in heard:
        plain = frame.kind in ("execution_start", "execution_cached", "feature_flags") or frame.ends_node_run
        ends = frame.ends_prompt or (frame.kind == "executing" and "prompt_id" not in frame.data)
        status = frame.kind == "status" and (after_verdict or "sid" in frame.data)
        if plain or ends or status:
            kind = "execution_over" if loosely and frame.ends_node_run else frame.kind
            data = {} if frame.kind == "status" else frame.data
            kept.append((f"{kind}{' (end)' if frame.ends_prompt else ''}", data))
            after_verdict = frame.ends_node_run
    return kept


def _counts(heard: list[Frame]) -> list[int]:
    """What `status` told, without repetitions."""
    told = [int(frame.data["status"]["exec_info"]["queue_remaining"]) for frame in heard if frame.kind == "status"]
    return [count for i, count in enumerate(told) if i == 0 or count != told[i - 1]]


def _timed(events: list[Event], recorded: list[Frame]) -> Timed:
    """Prompts of which this socket heard only a part, or that were cut short: the clock decides how much."""
    bodies = submissions(events)
    started = {frame.prompt for frame in recorded if frame.kind == "execution_start"}
    ended = {frame.prompt for frame in recorded if frame.ends_prompt}
    everywhere = [frame_of(event) for event in events if event.dir == "ws-in"]
    cut = {frame.prompt for frame in everywhere if frame.kind == "execution_interrupted"}
    return {
        prompt
        for prompt, body in bodies.items()
        if prompt in cut or ("client_id" in body and (prompt not in started or prompt not in ended))
    }


def _by_node(heard: list[Frame], timed: Timed) -> dict[tuple[str, str], list[Any]]:
    """For each prompt and node what was told of it, in order. Whole states become their changes."""
    told: dict[tuple[str, str], list[Any]] = {}
    states: dict[str, dict[str, Any]] = {}
    last = ("", "")
    for frame in heard:
        prompt = frame.prompt or last[0]
        if frame.kind == "progress_state":
            before = states.get(prompt, {})
            states[prompt] = nodes = frame.data["nodes"]
            for node_id, state in nodes.items():
                if before.get(node_id) != state:
                    told.setdefault((prompt, node_id), []).append({"state": state})
            continue
        if frame.kind.startswith("binary"):
            node_id = frame.decoded.get("node_id") or frame.decoded.get("metadata", {}).get("node_id") or last[1]
            decoded = {k: v for k, v in frame.decoded.items() if k not in ("image_bytes", "format", "image_magic")}
            magic = str(frame.decoded.get("image_magic", ""))[:6]
            told.setdefault((prompt, node_id), []).append({frame.kind: decoded, "magic": magic})
            continue
        node = frame.data.get("node")
        if node is None or "prompt_id" not in frame.data:
            if frame.kind == "execution_error" and not frame.ends_node_run:
                told.setdefault((prompt, frame.data["node_id"]), []).append({frame.kind: frame.data})
            continue
        last = (prompt, node)
        told.setdefault(last, []).append({frame.kind: frame.data})
    return {key: _collapsed(items) if key[0] in timed else items for key, items in told.items()}


def _collapsed(items: list[Any]) -> list[Any]:
    """Only which kinds of frame there were."""
    return sorted({next(iter(item)) for item in items})
