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
from managers.processes.environment import forbidden

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
    """The service's own doors. `max_body` in bytes, `retention` in days. Off: `rate_limit` None, `max_sockets` 0."""

    key: str
    keys_file: Path | None
    providers_file: Path | None
    host: str
    port: int
    data_dir: Path
    retention: int
    rate_limit: str | None
    rate_limit_allow: tuple[Network, ...]
    trusted_proxies: tuple[Network, ...]
    metrics_auth: bool
    max_body: int
    max_sockets: int
    shutdown_seconds: float
    drain: bool
    cors_allowed_origins: tuple[str, ...]


class ComfyUISettings(Struct, frozen=True):
    """The backends, their folders on this machine, and how the queue treats them. Times in seconds.

    `restart_environ` is what `restart_command` gets to see of our environment.
    """

    backends: tuple[BackendSettings, ...]
    outputs: Path
    models: ModelFolders
    timeout: float
    max_queue: int
    priority_aging: float
    prefetch: bool
    free_when_idle_seconds: float
    gone_seconds: float
    interrupt_seconds: float
    stall_seconds: float
    stall_interrupt: bool
    restart_command: values.Command
    restart_environ: dict[str, str]
    path: Path
    autostart: bool
    autostop: bool
    python: Path | None
    args: values.Command
    env: tuple[str, ...]


class GpuSettings(Struct, frozen=True):
    """How often cards are sampled, in seconds (0: never), and whose they are; None: of ComfyUIs on this machine."""

    sample_seconds: float
    running_sample_seconds: float
    backends: tuple[values.BackendCards, ...] | None


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
    """The whole tree, and the rows that tell where each value came from.

    `environ` is what of our environment programs may get a part of: all but our own settings, keys and secrets.
    """

    api: ApiSettings
    comfyui: ComfyUISettings
    gpu: GpuSettings
    log: LogSettings
    rows: tuple[Row, ...] = ()
    environ: dict[str, str] = {}


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


_HARMLESS = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DOCKER_HOST", "SSH_AUTH_SOCK"),
)
"""What commands that restart a service need to see; keys and secrets are none of it."""
_HOST = "0.0.0.0"  # noqa: S104 -- CONTRACT 9: a service for other machines
_VARIABLES = (
    ("KEY", "key", values.key, None, "The key that may do everything. Required."),
    ("KEYS_FILE", "keys_file", values.file, None, "More keys, each with its own rights: [keys](#keys)."),
    ("PROVIDERS_FILE", "providers_file", values.file, None, "What tasks may run: [tasks](tasks.md#providers)."),
    ("PORT", "port", values.whole(0, 65535), "9090", "The port to listen on; 0 takes a free one."),
    ("HOST", "host", values.host, _HOST, "The address to listen on."),
    ("DATA_DIR", "data_dir", values.folder, None, "Where the queue and its records are kept."),
    ("RETENTION", "retention", values.whole(0, 36500), "30", "Days that ended workflows are kept; 0: for ever."),
    ("RATE_LIMIT", "rate_limit", values.rate, "100/minute", "Requests and upgrades of one client; `off`: no limit."),
    ("RATE_LIMIT_ALLOW", "rate_limit_allow", values.networks, "", "Addresses and networks that are not limited."),
    ("TRUSTED_PROXIES", "trusted_proxies", values.networks, "", "Networks whose `X-Forwarded-For` is believed."),
    ("METRICS_AUTH", "metrics_auth", values.boolean, "false", "Ask for the key at `/metrics` too."),
    ("MAX_BODY", "max_body", values.size, "10MiB", "The largest request body; uploads have their own limit."),
    ("MAX_SOCKETS", "max_sockets", values.whole(0), "100", "Open streams of one client; 0: no limit."),
    ("SHUTDOWN_SECONDS", "shutdown_seconds", values.seconds(), "30", "How long stopping may take."),
    ("DRAIN", "drain", values.boolean, "false", "Stopping waits for running workflows to end, in that time."),
)
_FALLBACKS = {
    "KEY": "none",
    "KEYS_FILE": "none",
    "PROVIDERS_FILE": "four ready ones",
    "DATA_DIR": "the user data folder of the platform",
}

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
    Variable("COMFY_PATH", "comfyui.path", values.folder, "~/comfyui", "ComfyUI's folder, for the next ones."),
    _folder("COMFYUI_OUTPUTS", "comfyui.outputs", "output", "Where ComfyUI writes."),
    _folder("COMFYUI_MODELS_CHECKPOINTS", "models.checkpoints", "models/checkpoints", "Checkpoints."),
    _folder("COMFYUI_MODELS_LORAS", "models.loras", "models/loras", "LoRAs."),
    _folder("COMFYUI_MODELS_VAE", "models.vae", "models/vae", "VAEs."),
    _folder("COMFYUI_MODELS_CONTROLNET", "models.controlnet", "models/controlnet", "ControlNets."),
    _folder("COMFYUI_MODELS_UPSCALE", "models.upscale", "models/upscale_models", "Upscalers."),
    Variable(
        "COMFY_AUTOSTART",
        "comfyui.autostart",
        values.boolean,
        "false",
        "Start the ComfyUI there, and again when it dies: [tasks](tasks.md#comfyui-itself).",
    ),
    Variable("COMFY_AUTOSTOP", "comfyui.autostop", values.boolean, "false", "Stop it when the service stops."),
    Variable(
        "COMFY_PYTHON",
        "comfyui.python",
        values.file,
        None,
        "The Python it runs with.",
        fallback="that of `.venv` or `venv` in `COMFY_PATH`, else the service's",
    ),
    Variable("COMFY_ARGS", "comfyui.args", values.arguments, "", "More arguments for it, like `--lowvram`."),
    Variable("COMFY_ENV", "comfyui.env", values.names, "", "More variables that it gets to see, like `MY_*`."),
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
    Variable(
        "COMFYUI_GONE_SECONDS",
        "comfyui.gone_seconds",
        values.seconds(),
        "120",
        "Seconds after which others take over what a ComfyUI that is away was given; 0: never.",
    ),
    Variable(
        "COMFYUI_INTERRUPT_SECONDS",
        "comfyui.interrupt_seconds",
        values.seconds(above_zero=True),
        "60",
        "Seconds without a sign after an interrupt, until a ComfyUI counts as stalled.",
    ),
    Variable(
        "COMFYUI_STALL_SECONDS",
        "comfyui.stall_seconds",
        values.seconds(),
        "600",
        "Seconds of silence of a running workflow after which it is told; 0: never.",
    ),
    Variable(
        "COMFYUI_STALL_INTERRUPT",
        "comfyui.stall_interrupt",
        values.boolean,
        "false",
        "Stop a workflow that is silent for so long.",
    ),
    Variable(
        "COMFYUI_RESTART_COMMAND",
        "comfyui.restart_command",
        values.command,
        "",
        "What restarts a stalled ComfyUI; `manager`: ComfyUI-Manager does.",
    ),
    Variable(
        "GPU_SAMPLE_SECONDS",
        "gpu.sample_seconds",
        values.seconds(),
        "2",
        "Seconds between samples of the GPUs; 0: never.",
    ),
    Variable(
        "GPU_RUNNING_SAMPLE_SECONDS",
        "gpu.running_sample_seconds",
        values.seconds(above_zero=True),
        "0.25",
        "The same while a workflow runs.",
    ),
    Variable(
        "GPU_BACKENDS",
        "gpu.backends",
        values.cards,
        None,
        "Which ComfyUIs run on GPUs of this machine, and on which where that does not show: [GPUs](metrics.md#gpus).",
        fallback="those at a loopback address",
    ),
    Variable("LOG_LEVEL", "log.level", values.log_level, "info", "debug, info, warning, error or critical."),
    Variable("LOG_FORMAT", "log.format", values.log_format, "auto", "console or json; auto: console on a terminal."),
)

SECRETS = frozenset(variable.name for variable in VARIABLES if variable.secret)
"""Variables that no program gets to see."""


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
        raise SettingsError("MANAGEMENT_API_KEY is not set: choose the key that may do everything")
    _fall_back(found)
    sections: dict[str, dict[str, Any]] = {"api": {}, "comfyui": {}, "models": {}, "gpu": {}, "log": {}}
    for variable in VARIABLES:
        section, _, field = variable.field.partition(".")
        if section:
            sections[section][field] = found[variable.name]
    return Settings(
        api=ApiSettings(**sections["api"]),
        comfyui=ComfyUISettings(
            **sections["comfyui"],
            models=ModelFolders(**sections["models"]),
            restart_environ={name: environ[name] for name in _HARMLESS if name in environ},
        ),
        gpu=GpuSettings(**sections["gpu"]),
        log=LogSettings(**sections["log"]),
        rows=tuple(
            Row(variable.name, _shown(variable, found[variable.name]), _default(variable), sources[variable.name])
            for variable in VARIABLES
        ),
        environ={name: value for name, value in environ.items() if not forbidden(name, SECRETS)},
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
    known = {backend.name for backend in found["COMFYUI_BACKENDS"]}
    for place in found["GPU_BACKENDS"] or ():
        if place.name not in known:
            raise SettingsError(f"GPU_BACKENDS={place.name} is no backend: give some of {', '.join(sorted(known))}")
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
            return "off" if variable.default else ""
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
