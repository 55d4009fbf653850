"""Every variable of the environment, one row each: name, place in the settings, meaning, default.

`settings.load`, `management-api config` and docs/configuration.md all come from this table. Must never read the
environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from management_api import values


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
    ("KEY", "key", values.key, None, "The key that may do everything. Required."),
    ("KEYS_FILE", "keys_file", values.file, None, "More keys, each with its own rights: [keys](#keys)."),
    ("PROVIDERS_FILE", "providers_file", values.file, None, "What tasks may run: [tasks](tasks.md#providers)."),
    ("TEMPLATES", "templates", values.folder, None, "Templates as files: [generate](generate.md#files)."),
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
_UPLOADS = (
    ("S3_BUCKET", "s3.bucket", values.bucket, None, "Where outputs are uploaded to: [deliveries](delivery.md#s3)."),
    (
        "S3_PREFIX",
        "s3.prefix",
        values.prefix,
        "generated/comfyui",
        "Where keys begin: `S3_PREFIX/jobs/<workflowId>/`.",
    ),
    ("S3_ENDPOINT_URL", "s3.endpoint", values.address("the address of the store"), None, "A store that is not AWS."),
    (
        *("S3_PUBLIC_ENDPOINT_URL", "s3.public_endpoint", values.address("the address of the store"), None),
        "The same as others reach it: signed links name it.",
    ),
    (
        *("S3_PUBLIC_BASE_URL", "s3.public_base", values.address("the public address of the bucket"), None),
        "A bucket that all may read: links begin with it and are not signed.",
    ),
    ("CLOUDFRONT_DOMAIN", "s3.cdn", values.domain, None, "A CDN before the bucket; `S3_PUBLIC_BASE_URL` goes first."),
    ("S3_URL_TTL", "s3.url_ttl", values.whole(60, 604800), "86400", "Seconds that a signed link lives."),
    ("UPLOAD_CONCURRENCY", "s3.concurrency", values.whole(1, 64), "4", "How many outputs go up at once."),
    (
        *("UPLOAD_BEFORE_COMPLETE", "s3.before_complete", values.boolean, "false"),
        "A workflow is told complete when its outputs are uploaded, or 300 s later.",
    ),
    (
        "UPLOAD_DELETE_LOCAL",
        "s3.delete_local",
        values.boolean,
        "false",
        "Remove what was uploaded from this machine.",
    ),
    (
        *("DOWNLOAD_TIMEOUT_MS", "s3.download_timeout_ms", values.whole(100, 600_000), "7000"),
        "How long the sender may be silent while an output (of a ComfyUI elsewhere) or an input is fetched.",
    ),
    ("DOWNLOAD_RETRIES", "s3.download_retries", values.whole(0, 100), "2", "How often that is taken up again."),
    ("DOWNLOAD_RETRY_DELAY_MS", "s3.download_retry_delay_ms", values.whole(0, 600_000), "750", "The pause before."),
    ("AWS_REGION", "aws.region", values.key, "us-east-1", "The region of what is used of AWS, or of the store."),
    ("AWS_ACCESS_KEY_ID", "aws.access_key_id", values.key, None, "The key for it."),
    ("AWS_SECRET_ACCESS_KEY", "aws.secret_access_key", values.key, None, "Its secret."),
    ("AWS_SESSION_TOKEN", "aws.session_token", values.key, None, "What goes with a key that ends."),
)
_UPLOAD_FALLBACKS = {
    "S3_BUCKET": "none: nothing is uploaded",
    "S3_ENDPOINT_URL": "AWS",
    "S3_PUBLIC_ENDPOINT_URL": "`S3_ENDPOINT_URL`",
    "S3_PUBLIC_BASE_URL": "none",
    "CLOUDFRONT_DOMAIN": "none",
    "AWS_ACCESS_KEY_ID": "web identity, container or instance role",
    "AWS_SECRET_ACCESS_KEY": "as above",
    "AWS_SESSION_TOKEN": "none",
}
_FALLBACKS = {
    "KEY": "none",
    "KEYS_FILE": "none",
    "PROVIDERS_FILE": "four ready ones",
    "TEMPLATES": "none but `templates` in the data folder",
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
    *(
        Variable(
            *(name, field, parse, default, description),
            fallback=_UPLOAD_FALLBACKS.get(name, ""),
            secret=name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        )
        for name, field, parse, default, description in _UPLOADS
    ),
    Variable(
        "DELIVERY_LOG_DAYS",
        "delivery.log_days",
        values.whole(0, 36500),
        "7",
        "Days that what arrived stays in the [delivery log](delivery.md#the-delivery-log); 0: no limit.",
    ),
    Variable(
        "WEBHOOK_ALLOW_PRIVATE",
        "delivery.webhook_allow_private",
        values.boolean,
        "false",
        "Webhooks may go to private networks and to this machine: for a lab.",
    ),
    Variable(
        "INPUT_MAX_BYTES",
        "inputs.max_bytes",
        values.size,
        "512MiB",
        "The largest [input](COMFYUI_API.md#inputs), uploaded by hand or fetched.",
    ),
    Variable(
        "INPUT_ALLOW_PRIVATE",
        "inputs.allow_private",
        values.boolean,
        "false",
        "Inputs may be fetched from private networks and from this machine: for a lab.",
    ),
    Variable(
        "EVENTBRIDGE_BUS_NAME",
        "eventbridge.bus_name",
        values.key,
        None,
        "The event bus that hears everything: [deliveries](delivery.md#eventbridge).",
        fallback="none",
    ),
    Variable(
        "EVENTBRIDGE_ENDPOINT_URL",
        "eventbridge.endpoint",
        values.address("the address of EventBridge"),
        None,
        "One that is not that of the region.",
        fallback="AWS",
    ),
    Variable("EVENT_NAMING", "eventbridge.naming", values.naming, "camel", "Names in its events: camel or snake."),
    Variable(
        "EVENT_PROGRESS_SECONDS",
        "eventbridge.progress_seconds",
        values.seconds(),
        "1",
        "Seconds between two events of the same progress.",
    ),
    Variable(
        "GENERATE_TEMPLATE",
        "api.generate_template",
        values.template,
        "txt2img",
        "The template of `POST /v1/generate`, with `@` and an alias where one is meant.",
    ),
    Variable("LOG_LEVEL", "log.level", values.log_level, "info", "debug, info, warning, error or critical."),
    Variable("LOG_FORMAT", "log.format", values.log_format, "auto", "console or json; auto: console on a terminal."),
)

SECRETS = frozenset(variable.name for variable in VARIABLES if variable.secret)
"""Variables that no program gets to see."""
