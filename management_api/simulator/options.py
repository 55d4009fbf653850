"""What a simulator can be told when it is started. Plain values; nothing here reads the environment."""

from pathlib import Path

import msgspec


class SimulatorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one simulator behaves. `directory` gets the folders output, input, temp and models."""

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8188
    """0 lets the system choose; the address in use is handed to `ready`."""
    previews: bool = False
    """Whether samplers send previews (a real server: `--preview-method`)."""
    version: str = "0.3.64"
    """What `/system_stats` says."""
    pretend_models: bool = True
    """Whether an empty model folder shows one made-up name, so that a txt2img workflow can run."""
    step_seconds: float = 0.05
    """How long one step of the pretended sampler takes."""
    max_upload_bytes: int = 100 * 1024 * 1024
    without: tuple[str, ...] = ()
    """Node classes it does not have, as a ComfyUI without some custom nodes."""
    faults: bool = False
    """Whether `POST /_faults` exists (tests only)."""
    ledger: Path | None = None
    """A file that gets a line for everything it really did (see `ledger`; tests only)."""
