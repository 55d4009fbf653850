"""Programs that the service starts, as configured: tasks, and a ComfyUI on this machine.

Must never hold a rule of its own; it turns settings into the small configs of `managers.processes`.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from management_api.settings import Settings
from management_api.variables import SECRETS
from managers.processes.comfyui import ENVIRON, CannotManage, ManagedConfig, interpreter
from managers.processes.environment import allowed
from managers.processes.manager import TasksConfig
from managers.processes.providers import read_providers
from managers.workflows.dispatcher import Dispatcher

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def tasks_config(settings: Settings) -> TasksConfig:
    """Raises `ProvidersError`."""
    return TasksConfig(
        folder=settings.api.data_dir / "tasks",
        providers=read_providers(settings.api.providers_file, SECRETS),
        environ=settings.environ,
        withheld=SECRETS,
        retention_days=settings.api.retention,
    )


def managed_config(settings: Settings) -> ManagedConfig | None:
    """The ComfyUI to start, for the first backend at an address of this machine. Raises `CannotManage`."""
    comfyui = settings.comfyui
    if not comfyui.autostart:
        return None
    backend = next((one for one in comfyui.backends if urlsplit(one.url).hostname in LOOPBACK), None)
    if backend is None:
        raise CannotManage("COMFY_AUTOSTART=true needs a backend at an address of this machine, like 127.0.0.1")
    parts = urlsplit(backend.url)
    if parts.scheme != "http" or parts.path:
        raise CannotManage(f"COMFY_AUTOSTART=true needs a backend at a plain http:// address, not {parts.scheme}")
    main = comfyui.path / "main.py"
    if not main.is_file():
        raise CannotManage(f"COMFY_AUTOSTART=true finds no ComfyUI: there is no {main} (COMFY_PATH)")
    python = interpreter(comfyui.path, comfyui.python)
    where = ("--listen", parts.hostname or "127.0.0.1", "--port", str(parts.port or 80))
    return ManagedConfig(
        name=backend.name,
        url=backend.url,
        folder=settings.api.data_dir / "comfyui" / backend.name,
        directory=comfyui.path,
        argv=(python, "main.py", *where, *comfyui.args.argv),
        # Its log goes through a pipe: without this it would come in pieces, late.
        environ={**allowed(settings.environ, (*ENVIRON, *comfyui.env), SECRETS), "PYTHONUNBUFFERED": "1"},
        stop_with_service=comfyui.autostop,
    )


def uncharged(dispatchers: list[Dispatcher], name: str) -> None:
    """What executes there is lost by our own hand: no workflow is charged with that death."""
    for dispatcher in dispatchers:
        if dispatcher.name == name:
            dispatcher.backend.excuse_break()
