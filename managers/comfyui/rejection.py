"""ComfyUI's own refusal of a prompt, and its error texts, in a form that may be shown to a client.

Must never raise, whatever the body is (a proxy may have written it), and never let a path of the backend's machine or
a traceback through (PROTOCOL §5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from managers.comfyui.graph import pointer
from managers.comfyui.object_info import COMBO
from managers.events.types import Finding

_MAX_TEXT = 4000
_MAX_ALLOWED = 100

_NODE_ID = re.compile(r"Node ID '#(.+?)'", re.DOTALL)
_NO_SUCH_CLASS = re.compile(r"node (.+) does not exist", re.DOTALL)

# A quoted path may hold blanks; so may one of Windows, up to its last separator.
_PATH = re.compile(
    r"(?P<quote>['\"])(?P<quoted>(?:/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\\w|file://|~/)[^'\"\n]*)(?P=quote)"
    r"|(?<![\w/\\.:~%-])(?:"
    r"[A-Za-z]:[\\/](?:[^\\/:*?\"'<>|\r\n]+[\\/])*[^\\/:*?\"'<>|\s,;()\[\]]*"
    r"|\\\\\w[^\s'\"<>|,;()\[\]]*"
    r"|file://[^\s'\"<>|,;()\[\]]*"
    r"|~?/(?=[^\s/])[^\s'\"<>|,;:()\[\]{}]*)"
)
_FILE = re.compile(r"[^/\\]*[^/\\.\s][^/\\]*\.\w{1,12}")


def scrub(text: str) -> str:
    """`text` without tracebacks and absolute paths; the last part of a file's path stays: `…/model.safetensors`."""
    kept = "\n".join(_without_tracebacks(text[:_MAX_TEXT].splitlines()))
    return _PATH.sub(_last_part, kept).strip()


def _without_tracebacks(lines: list[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if line.lstrip().startswith(("Traceback (most recent call last)", 'File "')):
            inside = True
        elif not inside or not line[:1].isspace():
            inside = False
            yield line


def _last_part(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    last = re.split(r"[/\\]", (found["quoted"] or found[0]).rstrip("."))[-1]
    return f"{quote}…/{last}{quote}" if _FILE.fullmatch(last) else f"{quote}…{quote}"


def findings_from_rejection(body: object) -> list[Finding]:
    """Findings from the body of a 400 on POST /prompt, or of a 200 with node_errors (PROTOCOL §2). Never empty."""
    answer = body if isinstance(body, dict) else {}
    nodes = answer.get("node_errors")
    findings = [
        finding
        for node_id, node in (nodes.items() if isinstance(nodes, dict) else ())
        if isinstance(node, dict)
        for finding in _from_node(str(node_id), node)
    ]
    return findings or [_from_error(answer.get("error"))]


def _from_node(node_id: str, node: dict[str, object]) -> Iterator[Finding]:
    class_type = _text(node.get("class_type")) or None
    errors = node.get("errors")
    for error in errors if isinstance(errors, list) else ():
        if not isinstance(error, dict):
            continue
        extra = error.get("extra_info")
        extra = extra if isinstance(extra, dict) else {}
        name = _text(extra.get("input_name")) or None
        said = _sentence(error)
        yield Finding(
            code=_text(error.get("type")) or "rejected",
            message=f"{class_type or 'Node'} ({node_id}): {said}",
            pointer=pointer(node_id, "inputs", name) if name else pointer(node_id),
            node_id=node_id,
            class_type=class_type,
            input=name,
            allowed=_allowed(extra.get("input_config")),
        )


def _from_error(error: object) -> Finding:
    """The answers that name no node in `node_errors`: unknown class, no output, a circle."""
    told = error if isinstance(error, dict) else {"message": error}
    code, said = _text(told.get("type")), _sentence(told)
    extra = told.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    found = _NODE_ID.search(said)
    node_id = _text(extra.get("node_id")) or (found[1] if found else None)
    found = _NO_SUCH_CLASS.search(said)
    class_type = _text(extra.get("class_type")) or (found[1] if found else None)
    if code == "invalid_prompt" and class_type:
        code = "missing_node_type"
    elif code == "invalid_prompt" and node_id:
        code = "class_type_missing"
    elif code == "prompt_outputs_failed_validation":
        # Only a circle leaves node_errors empty (`reject_cycle`); newer servers name it per node.
        said += " It names no node, which means that the nodes form a circle."
    return Finding(
        code=code or "rejected",
        message=said,
        pointer=pointer(node_id) if node_id else pointer(),
        node_id=node_id,
        class_type=class_type,
    )


def _sentence(error: dict[str, object]) -> str:
    message, details = _text(error.get("message")), _text(error.get("details"))
    message = message.rstrip(".") or "ComfyUI refused it without a reason"
    return f"{message}." if not details or details.rstrip(".") == message else f"{message}: {details}"


def _text(value: object) -> str:
    return scrub(value) if isinstance(value, str) else ""


def _allowed(config: object) -> object:
    """The list or the bounds in the `input_config` that ComfyUI repeats; None when it says neither."""
    if not isinstance(config, list) or not config:
        return None
    extra = config[1] if len(config) > 1 and isinstance(config[1], dict) else {}
    values = extra.get("options") if config[0] == COMBO else config[0]
    if isinstance(values, list):
        return values[:_MAX_ALLOWED]
    return {key: extra[key] for key in ("min", "max") if key in extra} or None
