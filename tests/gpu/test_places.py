"""Which ComfyUI is on which card: by its process, and by what was configured."""

from __future__ import annotations

import os
import socket

import pytest

from management_api.services import gpu_config
from management_api.settings import SettingsError
from managers.gpu import Gpu, GpuProcess
from managers.gpu.owners import Owners
from tests.serving import SettingsMaker

BACKENDS = "a=http://127.0.0.1:8188,b=http://comfyui:8188"


def owners_of(ports: dict[int, str], *pids: int) -> list[str | None]:
    gpu = Gpu(gpu_id="0", index=0, processes=tuple(GpuProcess(pid=pid) for pid in pids))
    [named] = Owners(ports).name((gpu,))
    return [process.backend for process in named.processes or ()]


def test_a_process_is_the_comfyui_on_whose_port_it_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert owners_of({port: "a", 1: "b"}, os.getpid()) == ["a"]
        # Only connected to it is not enough; init is none of ours, and the last is none at all.
        assert owners_of({port: "a"}, os.getppid(), 1, 2**32 - 1) == [None, None, None]
        with socket.create_connection(("127.0.0.1", port)) as connected:
            assert owners_of({connected.getsockname()[1]: "b"}, os.getpid()) == [None]


def test_cards_without_processes_stay_as_they_are() -> None:
    gpus = (Gpu(gpu_id="0", index=0), Gpu(gpu_id="1", index=1, processes=()))
    assert Owners({8188: "a"}).name(gpus) == gpus


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("", None),
        ("b", {"b": ()}),
        ("a=0,b=1+2.0", {"a": ("0",), "b": ("1", "2.0")}),
        (" a , b=10 ", {"a": (), "b": ("10",)}),
    ],
)
def test_gpu_backends(make_settings: SettingsMaker, text: str, here: dict[str, tuple[str, ...]] | None) -> None:
    config = gpu_config(make_settings(COMFYUI_BACKENDS=BACKENDS, GPU_BACKENDS=text, GPU_SAMPLE_SECONDS=""))
    assert config.here == here
    assert (config.sample_seconds, config.running_seconds) == (2, 0.25)


@pytest.mark.parametrize("text", ["c", "a=", "a=x", "a=0+", "a=0.0.0", "A=0", "a=0 b=1"])
def test_what_gpu_backends_cannot_be(make_settings: SettingsMaker, text: str) -> None:
    with pytest.raises(SettingsError, match=r"^GPU_BACKENDS="):
        make_settings(COMFYUI_BACKENDS=BACKENDS, GPU_BACKENDS=text)
