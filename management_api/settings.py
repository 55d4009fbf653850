"""Everything an operator can choose, read once into one tree of values (CONTRACT 1, 4, 9).

The only reader of the environment. Must never be handed on below `app.py`: each manager has its own small config.
Every variable is one row of `variables.VARIABLES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import platformdirs
from dotenv import dotenv_values
from msgspec import Struct

from management_api import values
from management_api.values import BackendSettings, LogFormat, LogLevel, Network
from management_api.variables import SECRETS, VARIABLES, Variable
from managers.processes.environment import forbidden

Source = Literal["environment", ".env", "default"]

MASK = "********"

_HARMLESS = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DOCKER_HOST", "SSH_AUTH_SOCK"),
)
"""What commands that restart a service need to see; keys and secrets are none of it."""


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
    templates: Path | None
    generate_template: str
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


class S3Settings(Struct, frozen=True):
    """Where outputs are uploaded to (`bucket` None: nowhere), how, and what links to them look like. `url_ttl` in s.

    `public_base` and `cdn` None: links are signed, for `public_endpoint`.
    """

    bucket: str | None
    prefix: str
    endpoint: str | None
    public_endpoint: str | None
    public_base: str | None
    cdn: str | None
    url_ttl: int
    concurrency: int
    before_complete: bool
    delete_local: bool
    download_timeout_ms: int
    download_retries: int
    download_retry_delay_ms: int


class AwsSettings(Struct, frozen=True):
    """Who we are to AWS and to stores that speak like it. Without keys the roles of the machine count."""

    region: str
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None


class EventBridgeSettings(Struct, frozen=True):
    """The event bus (`bus_name` None: there is none), and how it is told."""

    bus_name: str | None
    endpoint: str | None
    naming: values.Naming
    progress_seconds: float


class DeliverySettings(Struct, frozen=True):
    """What leaves the house: how many days it stays in the log (0: no limit), and where webhooks may go."""

    log_days: int
    webhook_allow_private: bool


class InputSettings(Struct, frozen=True):
    """Files that workflows begin with: how large one may be, and where they may be fetched from."""

    max_bytes: int
    allow_private: bool


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
    s3: S3Settings
    aws: AwsSettings
    eventbridge: EventBridgeSettings
    delivery: DeliverySettings
    inputs: InputSettings
    log: LogSettings
    rows: tuple[Row, ...] = ()
    environ: dict[str, str] = {}

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no line of the log is to show."""
        aws = self.aws
        given = (self.api.key, aws.access_key_id, aws.secret_access_key, aws.session_token)
        return tuple(secret for secret in given if secret)


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
    sections: dict[str, dict[str, Any]] = {
        "api": {},
        "comfyui": {},
        "models": {},
        "gpu": {},
        "s3": {},
        "aws": {},
        "eventbridge": {},
        "delivery": {},
        "inputs": {},
        "log": {},
    }
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
        s3=S3Settings(**sections["s3"]),
        aws=AwsSettings(**sections["aws"]),
        eventbridge=EventBridgeSettings(**sections["eventbridge"]),
        delivery=DeliverySettings(**sections["delivery"]),
        inputs=InputSettings(**sections["inputs"]),
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
    if bool(found["AWS_ACCESS_KEY_ID"]) != bool(found["AWS_SECRET_ACCESS_KEY"]):
        raise SettingsError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together: give both, or none")
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
