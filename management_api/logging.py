"""What is written down: one line an event, JSON or console, on stderr (CONTRACT 1).

Every line leaves through one gate that blots out the registered secrets, tickets and signatures, whoever wrote them.
Must never be set up by importing it; `configure` does it once for the process.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO, Any, Literal

import msgspec
import structlog

BLOT = b"***"

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request this task works for; log lines carry it."""

_NAMED = re.compile(
    rb"(?i)\b(ticket|token|signature|sig|(?:x-)?api[_-]?key|x-amz-[a-z-]+)(=|%3d|\\?[\"']?\s*[:,=]\s*b?\\?[\"']?)"
    rb"([^\s&\"'\\,;)\]}]+)"
)
_OUR_KEYS = re.compile(rb"cma_[A-Za-z0-9_-]{43}")  # named keys: the service knows only their hashes
_BEARER = re.compile(rb"(?i)\b(bearer)(\s+|,\s*)([^\s\"'\\]+)")
_NOISY = ("httpx", "httpcore", "websockets", "asyncio", "uvicorn.access", "multipart")


class Gate:
    """A stream for log lines that lets no secret through."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._bytes: IO[bytes] | None = getattr(stream, "buffer", None)
        self._secrets: list[bytes] = []

    def hide(self, *secrets: str) -> None:
        """Blot out these values from now on, also as JSON writes them."""
        for secret in secrets:
            if secret:
                plain = secret.encode()
                self._secrets += {plain, msgspec.json.encode(secret)[1:-1]}
        self._secrets.sort(key=len, reverse=True)

    def write(self, line: bytes) -> None:
        """Write one line, blotted, without its end."""
        self.write_known(_BEARER.sub(rb"\1\2***", _NAMED.sub(rb"\1\2***", line)))

    def write_known(self, line: bytes) -> None:
        """The same for a line that is known to hold no query: only the secrets are looked for."""
        for secret in self._secrets:
            if secret in line:
                line = line.replace(secret, BLOT)
        if b"cma_" in line:
            line = _OUR_KEYS.sub(BLOT, line)
        try:
            if self._bytes is not None:
                self._bytes.write(line + b"\n")
                self._bytes.flush()
            else:
                self._stream.write(line.decode("utf-8", "replace") + "\n")
        except (OSError, ValueError):  # nobody reads any more; the service goes on
            pass

    # what structlog calls on a logger
    msg = log = debug = info = warning = error = critical = exception = fatal = write


class AccessLine(msgspec.Struct, omit_defaults=True):
    """One request, as it is logged. The path has no query: tickets travel there. `key` is the name of one."""

    timestamp: str
    level: str
    event: str
    request_id: str
    client: str
    method: str
    path: str
    status: int
    milliseconds: float
    key: str | None = None


class AccessLog:
    """The quick way for the line each request gets: no processors, one encode, one write."""

    def __init__(self, gate: Gate | None, *, as_json: bool) -> None:
        self._gate = gate
        self._as_json = as_json
        self._encode = msgspec.json.Encoder().encode

    def write(
        self,
        *,
        request: str,
        client: str,
        method: str,
        path: str,
        status: int,
        seconds: float,
        key: str | None = None,
    ) -> None:
        """Log one finished request; probes and pages are as welcome as the rest."""
        if self._gate is None:
            return
        milliseconds = round(seconds * 1000, 3)
        level = "error" if status >= 500 else "info"
        if self._as_json:
            line = self._encode(
                AccessLine(_now(), level, "request", request, client, method, path, status, milliseconds, key)
            )
        else:
            safe = path.encode("unicode_escape").decode()
            told = f"{method} {safe} {status} {milliseconds:.1f} ms  {client} {key or '-'} {request}"
            text = f"{_now()} {level:8} {told}"
            line = text.encode("utf-8", "replace")
        if "=" in path or ":" in path:
            self._gate.write(line)
        else:
            self._gate.write_known(line)


class Logs:
    """What `configure` hands back: the gate, to register secrets, and the access log."""

    def __init__(self, gate: Gate, access: AccessLog) -> None:
        self.gate = gate
        self.access = access


SILENT = Logs(Gate(sys.stderr), AccessLog(None, as_json=True))
"""For tests and tools: no access log, structlog as it is."""


def configure(
    level: str,
    style: Literal["auto", "console", "json"],
    stream: IO[str] | None = None,
    secrets: tuple[str, ...] = (),
) -> Logs:
    """Set up structlog and the standard library's logging for this process, once."""
    stream = stream if stream is not None else sys.stderr
    as_json = style == "json" or (style == "auto" and not stream.isatty())
    gate = Gate(stream)
    gate.hide(*secrets)
    shared: list[structlog.types.Processor] = [
        _add_request_id,
        structlog.processors.add_log_level,
        _add_time,
    ]
    render: list[structlog.types.Processor] = (
        [structlog.processors.format_exc_info, _render_json]
        if as_json
        else [_console(colors=stream.isatty()), _to_bytes]
    )
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: gate,
        cache_logger_on_first_use=False,
    )
    _configure_standard_library(number, gate, [*shared, *render])
    return Logs(gate, AccessLog(gate if number <= logging.INFO else None, as_json=as_json))


def _configure_standard_library(number: int, gate: Gate, processors: list[structlog.types.Processor]) -> None:
    """Lines of libraries go the same way. uvicorn logs the whole address of a WebSocket at info: so not that."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(_Bridge(gate, processors))
    root.setLevel(number)
    for name in ("uvicorn", "uvicorn.error", *_NOISY):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


class _Bridge(logging.Handler):
    """Standard library records through structlog's processors and the gate."""

    def __init__(self, gate: Gate, processors: list[structlog.types.Processor]) -> None:
        super().__init__()
        self._gate = gate
        self._processors = processors

    def emit(self, record: logging.LogRecord) -> None:
        """Render and write; a record that cannot be rendered is reported by logging's own way."""
        try:
            event: Any = {"event": record.getMessage(), "logger": record.name}
            if record.exc_info:
                event["exc_info"] = record.exc_info
            for processor in self._processors:
                event = processor(None, record.levelname.lower(), event)
            self._gate.write(event)
        except (TypeError, ValueError, KeyError):
            self.handleError(record)


def _now() -> str:
    now = time.time()
    return f"{_second(int(now))}.{int(now % 1 * 1000):03d}Z"


@lru_cache(2)
def _second(epoch: int) -> str:
    return f"{datetime.fromtimestamp(epoch, UTC):%Y-%m-%dT%H:%M:%S}"


def _add_time(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["timestamp"] = _now()
    return event


def _add_request_id(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    identifier = request_id.get()
    if identifier is not None:
        event.setdefault("request_id", identifier)
    return event


def _render_json(_: Any, __: str, event: MutableMapping[str, Any]) -> bytes:
    return msgspec.json.encode(dict(event), enc_hook=repr)


def _console(*, colors: bool) -> structlog.dev.ConsoleRenderer:
    """Plain tracebacks: the coloured ones show local variables, and with them keys."""
    return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)


def _to_bytes(_: Any, __: str, text: Any) -> bytes:
    return str(text).encode("utf-8", "replace")
