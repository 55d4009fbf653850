"""The manager in a process that finds the stub driver: what it tells when that goes, hangs, and comes back."""

from __future__ import annotations

import time
from typing import Any

from tests.gpu.driver import LOST, NOT_LOADED, Driver, card
from tests.gpu.talk import child

SAMPLE, HUNG = "0.02", "0.3"

VIEW = {
    "gpuId": "0",
    "index": 0,
    "uuid": "GPU-00000000",
    "name": "NVIDIA Stub 0",
    "utilization": 40,
    "memory": {"used": 4096, "total": 24576, "percentUsed": 16.7},
    "temperature": 60,
    "powerWatts": 200.5,
}
UNKNOWN = dict.fromkeys(("uuid", "name", "utilization", "memory", "temperature")) | {"gpuId": "0", "index": 0}


def is_sample(*gpu_ids: str) -> Any:
    """A `gpu:sample` of exactly these cards."""
    return lambda said: said.get("type") == "gpu:sample" and [gpu["gpuId"] for gpu in said["gpus"]] == list(gpu_ids)


def is_snapshot(said: dict[str, Any]) -> bool:
    return "available" in said


def test_what_is_told_follows_the_driver(driver: Driver) -> None:
    driver.says(card(0), card(1), count=2)
    with child(driver.environ, "manage", SAMPLE, HUNG) as process:
        sample = process.until(is_sample("0", "1"))
        assert set(sample) == {"type", "timestamp", "gpus"}
        assert sample["gpus"][0] == VIEW
        driver.says(count=1)
        assert process.until(is_sample("0"))["gpus"] == [UNKNOWN]

        driver.says(card(0), card(1, handle=f"!{LOST}"), count=2)
        process.until(lambda said: is_sample("0")(said) and said["gpus"][0]["name"] is not None)
        process.write("snapshot")
        snapshot = process.until(is_snapshot)
        assert (snapshot["available"], snapshot["gpus"]) == (True, [VIEW])
        assert snapshot["error"].startswith("GPU 1: ")
        # A fresh start may bring the card back.
        inits = driver.calls("init")
        process.until(lambda _: driver.calls("init") > inits)

        driver.says(driver=NOT_LOADED)
        process.until(is_sample())
        process.write("snapshot")
        gone = process.until(is_snapshot)
        assert (gone["available"], gone["gpus"]) == (False, [])
        assert gone["error"].startswith("NVML: ")

        driver.says(card(0), count=1)
        assert process.until(is_sample("0"))["gpus"] == [VIEW]
        process.write("snapshot")
        assert process.until(is_snapshot) == {"available": True, "gpus": [VIEW]}
        assert process.end() == 0
    assert driver.calls("shutdown") == driver.calls("init") - failed_inits(driver)


def failed_inits(driver: Driver) -> int:
    """An init that is not followed by a question failed."""
    calls = driver.calls_file.read_text().split()
    return sum(one == "init" and after != "count" for one, after in zip(calls, [*calls[1:], ""], strict=True))


def test_a_driver_that_hangs_is_told_and_holds_up_nothing(driver: Driver) -> None:
    with child(driver.environ, "manage", SAMPLE, HUNG) as process:
        process.until(is_sample("0"))
        driver.says(card(0), count=1, hang=1)
        process.until(is_sample())
        assert process.ask("snapshot") == {
            "available": False,
            "gpus": [],
            "error": "NVML: the driver does not answer",
        }
        driver.says(card(0), count=1)
        process.until(is_sample("0"))
        driver.says(card(0), count=1, hang=1)
        process.until(is_sample())
        begun = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - begun < 5
        assert process.until(lambda said: said == "stopped")


def test_a_driver_that_hangs_from_the_beginning(driver: Driver) -> None:
    driver.says(hang=1)
    with child(driver.environ, "manage", SAMPLE, HUNG) as process:
        while "error" not in (found := process.ask("snapshot")):
            assert found == {"available": False, "gpus": []}
        assert found == {"available": False, "gpus": [], "error": "NVML: the driver does not answer"}
        driver.says(card(0), count=1)
        process.until(is_sample("0"))
