"""The adapter with the real `pynvml`, in a process that finds the stub driver: each field, each card, on its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.driver import LOST, MIB, MISMATCH, NOT_LOADED, Driver, card
from tests.gpu.talk import Child, child

FIELDS = {
    "uuid": "GPU-00000000",
    "name": "NVIDIA Stub 0",
    "utilization": 40,
    "memory_used": 4 * 1024 * MIB,
    "memory_total": 24 * 1024 * MIB,
    "temperature": 60,
    "power": 200.5,
    "energy": 1000,
    "processes": [],
}
KEYS = {"memory_used": "memory", "memory_total": "memory"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Iterator[tuple[Driver, Child]]:
    found = Driver(tmp_path_factory.mktemp("driver"), library)
    with child(found.environ, "read") as process:
        yield found, process


@pytest.fixture
def driver(shared: tuple[Driver, Child]) -> Driver:
    return shared[0]


@pytest.fixture
def process(shared: tuple[Driver, Child]) -> Child:
    """One adapter for all tests here; each begins with a fresh connection to the driver."""
    shared[1].ask("close")
    return shared[1]


def cards(process: Child) -> list[Any]:
    reading = process.ask("read")
    assert reading.get("trouble", "unavailable") is None, reading
    return list(reading["gpus"])


def told(gpu: dict[str, Any]) -> dict[str, Any]:
    return {name: gpu[name] for name in FIELDS}


def test_every_field_in_its_unit(driver: Driver, process: Child) -> None:
    driver.says(card(0), card(1, processes=f"77:{3 * MIB} 78:"), count=2)
    first, second = cards(process)
    assert told(first) == FIELDS
    assert (first["gpu_id"], first["index"], first["split"]) == ("0", 0, False)
    assert (second["gpu_id"], second["index"], second["utilization"]) == ("1", 1, 41)
    shown = [(one["pid"], one["memory"]) for one in second["processes"]]
    assert shown == [(77, 3 * MIB), (78, None)]


def test_a_field_that_is_missing_takes_no_other_with_it(driver: Driver, process: Child) -> None:
    for key in ("uuid", "name", "utilization", "memory", "temperature", "power", "energy", "processes", "mig"):
        for broken in (None, "!3", "!4", "!999"):
            driver.says(card(0, **{key: broken}), count=1)
            [gpu] = cards(process)
            missing = {name for name in FIELDS if KEYS.get(name, name) == key}
            assert told(gpu) == {name: None if name in missing else value for name, value in FIELDS.items()}


def test_a_card_that_tells_nothing_is_still_there(driver: Driver, process: Child) -> None:
    driver.says(count=1)
    [gpu] = cards(process)
    assert told(gpu) == dict.fromkeys(FIELDS)


def test_a_name_that_is_no_text_is_not_known(driver: Driver, process: Child) -> None:
    driver.says(card(0, name="\udcff\udcfe"), count=1)
    [gpu] = cards(process)
    assert told(gpu) == FIELDS | {"name": None}


def test_mig_instances_stand_beside_the_card_they_are_part_of(driver: Driver, process: Child) -> None:
    instance = {
        "0.0.name": "NVIDIA Stub 0 MIG 1g.5gb",
        "0.0.uuid": "MIG-0",
        "0.0.memory": f"{100 * MIB} {4864 * MIB}",
        "0.0.processes": f"5:{90 * MIB}",
        "0.2.name": "NVIDIA Stub 0 MIG 2g.10gb",
    }
    driver.says(card(0, mig=7, utilization=None), instance, card(1), count=2)
    split, first, third, other = cards(process)
    assert [gpu["gpu_id"] for gpu in (split, first, third, other)] == ["0", "0.0", "0.2", "1"]
    # The memory and the processes of the card are those of its instances: nothing is told twice.
    nothing = dict.fromkeys(("utilization", "memory_used", "memory_total", "processes"))
    assert told(split) == FIELDS | nothing
    assert split["split"]
    assert told(first) == dict.fromkeys(FIELDS) | {
        "name": "NVIDIA Stub 0 MIG 1g.5gb",
        "uuid": "MIG-0",
        "memory_used": 100 * MIB,
        "memory_total": 4864 * MIB,
        "processes": [{"pid": 5, "memory": 90 * MIB, "backend": None}],
    }
    assert (third["index"], third["memory_used"]) == (0, None)
    assert other["memory_used"] == 5 * 1024 * MIB


@pytest.mark.parametrize("field", ["handle", "uuid", "power", "mig"])
def test_a_lost_card_leaves_the_others(driver: Driver, process: Child, field: str) -> None:
    driver.says(card(0), card(1, **{field: f"!{LOST}"}), card(2), count=3)
    reading = process.ask("read")
    assert [gpu["gpu_id"] for gpu in reading["gpus"]] == ["0", "2"]
    assert reading["trouble"].startswith("GPU 1: ")
    driver.says(card(0), card(1), card(2), count=3)
    assert [gpu["gpu_id"] for gpu in cards(process)] == ["0", "1", "2"]


def test_a_driver_that_is_away_and_comes_back(driver: Driver, process: Child) -> None:
    driver.says(driver=NOT_LOADED)
    assert "unavailable" in process.ask("read")
    before = driver.calls("shutdown")
    for round_ in (1, 2):
        driver.says(card(0), count=1)
        assert told(cards(process)[0]) == FIELDS
        driver.says(driver=NOT_LOADED)
        assert "unavailable" in process.ask("read")
        # Let go of each time, so that the driver can be unloaded.
        assert driver.calls("shutdown") == before + round_
    driver.says(count=0)
    assert process.ask("read") == {"unavailable": "NVML: the driver knows no card"}
    assert driver.calls("shutdown") == before + 3
    process.ask("close")
    assert driver.calls("shutdown") == before + 3


def test_a_library_that_comes_late_is_old_and_is_replaced(tmp_path: Path, library: Path, old_library: Path) -> None:
    driver = Driver(tmp_path, library)
    driver.break_library()
    with child(driver.environ, "read") as process:
        assert process.ask("read") == {"unavailable": "NVML: NVML Shared Library Not Found"}
        driver.install(old_library)
        # It does not know all functions, and counts what the driver reserves as used.
        assert told(cards(process)[0]) == FIELDS | {"memory_used": (4 * 1024 + 500) * MIB, "processes": None}
        driver.says(driver=MISMATCH)
        driver.install(library)
        assert "unavailable" in process.ask("read")
        driver.says(card(0), count=1)
        assert told(cards(process)[0]) == FIELDS
        assert process.end() == 0
