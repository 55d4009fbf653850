"""Everything an operator can choose, read once into one tree of values (CONTRACT 1, 4, 9).

The only reader of the environment. Must never be handed on below `app.py`: each manager has its own small config.
Every variable is one row of `VARIABLES`; `load`, `management-api config` and docs/configuration.md all come from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import platformdirs
from dotenv import dotenv_values
from msgspec import Struct

from management_api import values
from management_api.values import BackendSettings, LogFormat, LogLevel, Network

Source = Literal["environment", ".env", "default"]

MASK = "********"


class SettingsError(ValueError):
    """A value the service cannot start with; the message is one line for the operator and shows no secret."""


class ModelFolders(Struct, frozen=True):
    """Where models of each type lie."""

    checkpoints: Path
    loras: Path
    vae: Path
    controlnet: Path
    upscale: Path


class ApiSettings(Struct, frozen=True):
    """The service's own doors. `max_body` in bytes, `retention` in days; `rate_limit` None is off."""

    key: str
    host: str
    port: int
    data_dir: Path
    retention: int
    rate_limit: str | None
    rate_limit_allow: tuple[Network, ...]
    trusted_proxies: tuple[Network, ...]
    metrics_auth: bool
    max_body: int
    shutdown_seconds: float
    cors_allowed_origins: tuple[str, ...]


class ComfyUISettings(Struct, frozen=True):
    """The backends, their folders on this machine, and how the queue treats them. Times in seconds."""

    backends: tuple[BackendSettings, ...]
    outputs: Path
    models: ModelFolders
    timeout: float
    max_queue: int
    priority_aging: float
    prefetch: bool
    free_when_idle_seconds: float


class LogSettings(Struct, frozen=True):
    """What is logged, and how."""

    level: LogLevel
    format: LogFormat


class Row(Struct, frozen=True):
    """One line of `management-api config`: a variable, its effective value (secrets masked), where it is from."""

    name: str
    value: str
    default: str
    source: Source


class Settings(Struct, frozen=True):
    """The whole tree, and the rows that tell where each value came from."""

    api: ApiSettings
    comfyui: ComfyUISettings
    log: LogSettings
    rows: tuple[Row, ...] = ()


class Variable(Struct, frozen=True):
    """One variable. `field` is its place in the tree, "" for one that only feeds others.

    `default` is text that goes through `parse`; without one `fallback` tells what happens.
    """

    name: str
    field: str
    parse: Callable[[str], Any]
    default: str | None
    description: str
    fallback: str = ""
    secret: bool = False


def _folder(name: str, field: str, below: str, description: str) -> Variable:
    return Variable(name, field, values.folder, None, description, fallback=f"`COMFY_PATH`/{below}")


_HOST = "0.0.0.0"  # noqa: S104 -- CONTRACT 9: a service for other machines
_VARIABLES = (
    ("KEY", "key", values.key, None, "The key every client sends. Required."),
    ("PORT", "port", values.whole(0, 65535), "9090", "The port to listen on; 0 takes a free one."),
    ("HOST", "host", values.host, _HOST, "The address to listen on."),
    ("DATA_DIR", "data_dir", values.folder, None, "Where the queue and its records are kept."),
    ("RETENTION", "retention", values.whole(0, 36500), "30", "Days that ended workflows are kept; 0: for ever."),
    ("RATE_LIMIT", "rate_limit", values.rate, "100/minute", "Requests and upgrades of one client; `off`: no limit."),
    ("RATE_LIMIT_ALLOW", "rate_limit_allow", values.networks, "", "Addresses and networks that are not limited."),
    ("TRUSTED_PROXIES", "trusted_proxies", values.networks, "", "Networks whose `X-Forwarded-For` is believed."),
    ("METRICS_AUTH", "metrics_auth", values.boolean, "false", "Ask for the key at `/metrics` too."),
    ("MAX_BODY", "max_body", values.size, "10MiB", "The largest request body; uploads have their own limit."),
    ("SHUTDOWN_SECONDS", "shutdown_seconds", values.seconds(), "10", "How long open requests may take at the end."),
)
_FALLBACKS = {"KEY": "none", "DATA_DIR": "the user data folder of the platform"}

VARIABLES: tuple[Variable, ...] = (
    *(
        Variable(
            f"MANAGEMENT_API_{name}",
            f"api.{field}",
            parse,
            default,
            description,
            fallback=_FALLBACKS.get(name, ""),
            secret=name == "KEY",
        )
        for name, field, parse, default, description in _VARIABLES
    ),
    Variable(
        "CORS_ALLOWED_ORIGINS",
        "api.cors_allowed_origins",
        values.origins,
        "",
        "Web origins that may call from a browser, `*` for all; empty: only pages of this service.",
    ),
    Variable(
        "COMFYUI_BACKENDS",
        "comfyui.backends",
        values.backends,
        None,
        "Several ComfyUIs, `name=address,…`; each runs one workflow at a time. Goes before `COMFYUI_URL`.",
        fallback="one, `local`, at `COMFYUI_URL`",
    ),
    Variable(
        "COMFYUI_URL",
        "",
        values.url,
        None,
        "The address of ComfyUI. Goes before `COMFYUI_HOST` and `COMFYUI_PORT`.",
        fallback="`http://COMFYUI_HOST:COMFYUI_PORT`",
    ),
    Variable("COMFYUI_HOST", "", values.host, "127.0.0.1", "The host of ComfyUI."),
    Variable("COMFYUI_PORT", "", values.whole(1, 65535), "8188", "The port of ComfyUI."),
    Variable("COMFY_PATH", "", values.folder, "~/comfyui", "ComfyUI's folder, for the defaults of the next six."),
    _folder("COMFYUI_OUTPUTS", "comfyui.outputs", "output", "Where ComfyUI writes."),
    _folder("COMFYUI_MODELS_CHECKPOINTS", "models.checkpoints", "models/checkpoints", "Checkpoints."),
    _folder("COMFYUI_MODELS_LORAS", "models.loras", "models/loras", "LoRAs."),
    _folder("COMFYUI_MODELS_VAE", "models.vae", "models/vae", "VAEs."),
    _folder("COMFYUI_MODELS_CONTROLNET", "models.controlnet", "models/controlnet", "ControlNets."),
    _folder("COMFYUI_MODELS_UPSCALE", "models.upscale", "models/upscale_models", "Upscalers."),
    Variable(
        "COMFYUI_TIMEOUT",
        "comfyui.timeout",
        values.seconds(above_zero=True),
        "3600",
        "Seconds one workflow may execute.",
    ),
    Variable(
        "COMFYUI_MAX_QUEUE",
        "comfyui.max_queue",
        values.whole(1),
        "10000",
        "How many workflows may wait; more are refused with 503.",
    ),
    Variable(
        "COMFYUI_PRIORITY_AGING",
        "comfyui.priority_aging",
        values.seconds(),
        "600",
        "Seconds of waiting that are worth one priority class; 0: strict classes.",
    ),
    Variable(
        "COMFYUI_PREFETCH",
        "comfyui.prefetch",
        values.boolean,
        "true",
        "Hand ComfyUI the next workflow shortly before its turn, so that no gap is left.",
    ),
    Variable(
        "COMFYUI_FREE_WHEN_IDLE_SECONDS",
        "comfyui.free_when_idle_seconds",
        values.seconds(),
        "0",
        "Seconds of idleness after which ComfyUI is asked to free its memory; 0: never.",
    ),
    Variable("LOG_LEVEL", "log.level", values.log_level, "info", "debug, info, warning, error or critical."),
    Variable("LOG_FORMAT", "log.format", values.log_format, "auto", "console or json; auto: console on a terminal."),
)


def load(environ: Mapping[str, str], dotenv: Path | None, *, require_key: bool = True) -> Settings:
    """The settings of this environment; `dotenv` is a file read below it, where it exists.

    An empty value counts as unset. Raises `SettingsError`, one line. `require_key=False` is for showing settings.
    """
    below = _read_dotenv(dotenv)
    found: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for variable in VARIABLES:
        name = variable.name
        if environ.get(name):
            text, sources[name] = environ[name], "environment"
        elif below.get(name):
            text, sources[name] = below[name], ".env"
        else:
            text, sources[name] = variable.default or "", "default"
        found[name] = _parse(variable, text)
    if require_key and not found["MANAGEMENT_API_KEY"]:
        raise SettingsError("MANAGEMENT_API_KEY is not set: choose the key that clients will send")
    _fall_back(found)
    sections: dict[str, dict[str, Any]] = {"api": {}, "comfyui": {}, "models": {}, "log": {}}
    for variable in VARIABLES:
        section, _, field = variable.field.partition(".")
        if section:
            sections[section][field] = found[variable.name]
    return Settings(
        api=ApiSettings(**sections["api"]),
        comfyui=ComfyUISettings(**sections["comfyui"], models=ModelFolders(**sections["models"])),
        log=LogSettings(**sections["log"]),
        rows=tuple(
            Row(variable.name, _shown(variable, found[variable.name]), _default(variable), sources[variable.name])
            for variable in VARIABLES
        ),
    )


def describe(settings: Settings) -> tuple[Row, ...]:
    """The rows of `management-api config`: effective values, secrets and passwords in addresses masked."""
    return settings.rows


def markdown_table() -> str:
    """The table of docs/configuration.md."""
    lines = ["| variable | default | what it is |", "|---|---|---|"]
    for variable in VARIABLES:
        default = variable.fallback or (f"`{variable.default}`" if variable.default else "empty")
        lines.append(f"| `{variable.name}` | {default} | {variable.description} |")
    return "\n".join(lines) + "\n"


def _read_dotenv(path: Path | None) -> dict[str, str]:
    if path is None or not path.is_file():
        return {}
    try:
        return {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path.name} cannot be read: {type(error).__name__}") from None


def _parse(variable: Variable, text: str) -> Any:
    if not text and variable.default is None:
        return None
    try:
        return variable.parse(text)
    except ValueError as error:
        shown = MASK if variable.secret else repr(_without_password(text))
        raise SettingsError(f"{variable.name}={shown} is not understood: give {error}") from None


def _fall_back(found: dict[str, Any]) -> None:
    """Fill in what depends on other variables."""
    host = found["COMFYUI_HOST"]
    address = f"[{host}]" if ":" in host else host
    found["COMFYUI_URL"] = found["COMFYUI_URL"] or f"http://{address}:{found['COMFYUI_PORT']}"
    found["COMFYUI_BACKENDS"] = found["COMFYUI_BACKENDS"] or (BackendSettings("local", found["COMFYUI_URL"]),)
    found["MANAGEMENT_API_KEY"] = found["MANAGEMENT_API_KEY"] or ""
    if found["MANAGEMENT_API_DATA_DIR"] is None:
        found["MANAGEMENT_API_DATA_DIR"] = platformdirs.user_data_path("comfyui-management-api", appauthor=False)
    for variable in VARIABLES:
        if found[variable.name] is None and variable.fallback.startswith("`COMFY_PATH`/"):
            found[variable.name] = found["COMFY_PATH"] / variable.fallback.removeprefix("`COMFY_PATH`/")


def _default(variable: Variable) -> str:
    return variable.fallback.replace("`", "") or variable.default or ""


def _shown(variable: Variable, value: Any) -> str:
    if variable.secret:
        return MASK if value else ""
    match value:
        case None:
            return "off"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case BackendSettings():
            return f"{value.name}={_without_password(value.url)}"
        case tuple():
            return ",".join(_shown(variable, item) for item in value)
    return _without_password(str(value))


def _without_password(text: str) -> str:
    """Addresses may carry `user:password@`; nobody needs to read it back."""
    if "@" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{MASK}@{host}")) if host != parts.netloc else MASK
