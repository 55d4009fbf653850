"""The stub driver, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.driver import Driver, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it was years ago: fewer functions."""
    return build(tmp_path_factory.mktemp("old_nvml"), "-DOLD_DRIVER")


@pytest.fixture
def driver(tmp_path: Path, library: Path) -> Driver:
    """One card that tells everything, until the test says otherwise."""
    folder = tmp_path / "driver"
    folder.mkdir()
    return Driver(folder, library)
