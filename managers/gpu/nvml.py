"""NVIDIA's management library, as typed values (STACK §4). The only place that knows the module `pynvml`.

Must never be called on the loop: a call takes milliseconds, and one into a driver that hangs takes for ever. Must
never let one field, or one card, spoil what the others tell.
"""

from __future__ import annotations

import _ctypes
import contextlib
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from managers.gpu.values import Gpu, GpuProcess

# What says that a card, or the driver as a whole, is gone; everything else is about one field.
_GONE = frozenset(
    {
        "NVML_ERROR_UNINITIALIZED",
        "NVML_ERROR_DRIVER_NOT_LOADED",
        "NVML_ERROR_GPU_IS_LOST",
        "NVML_ERROR_RESET_REQUIRED",
        "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
    }
)


class NvmlUnavailable(Exception):
    """There is no library, no driver, or no card; the text says which."""


class Reading(Struct, frozen=True):
    """Every card that answered. `trouble`: which did not, and why; a fresh start (`close`) may help."""

    gpus: tuple[Gpu, ...]
    trouble: str | None = None


class Nvml:
    """A connection to the driver, made by `read` when there is none. For one thread."""

    def __init__(self) -> None:
        self._open = False
        self._nvml: Any = None  # the module has no types

    def read(self) -> Reading:
        """All cards and their MIG instances as they are now. Raises `NvmlUnavailable`."""
        nvml = self._library()
        try:
            if not self._open:
                nvml.nvmlInit()
                self._open = True
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            self.close()
            if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                _forget_library(nvml)
            raise NvmlUnavailable(f"NVML: {error}") from error
        if not count:
            self.close()
            raise NvmlUnavailable("NVML: the driver knows no card")
        gpus: list[Gpu] = []
        trouble = []
        for index in range(count):
            try:
                gpus += _Device(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index).read()
            except nvml.NVMLError as error:
                trouble.append(f"GPU {index}: {error}")
        return Reading(tuple(gpus), "; ".join(trouble) or None)

    def close(self) -> None:
        """Let go of the driver. Never raises."""
        if self._open and self._nvml is not None:
            self._open = False
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _library(self) -> Any:
        if self._nvml is None:
            import pynvml  # 8000 lines: read by this thread, so that nobody waits for them

            self._nvml = pynvml
        return self._nvml


class _Device:
    """One card while it is read. Raises NVMLError when it is gone."""

    def __init__(self, nvml: Any, handle: Any, index: int) -> None:
        self._nvml = nvml
        self._handle = handle
        self._index = index
        self._gone = {getattr(nvml, name) for name in _GONE}

    def read(self) -> list[Gpu]:
        """The card, and behind it its MIG instances."""
        nvml = self._nvml
        mode = self._ask(nvml.nvmlDeviceGetMigMode, self._handle)
        split = mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE
        card = self._values(self._handle, str(self._index), split=split)
        return [card, *(self._instances() if split else ())]

    def _instances(self) -> list[Gpu]:
        """The count is how many there could be; a place that is not taken answers NotFound."""
        nvml = self._nvml
        most = self._ask(nvml.nvmlDeviceGetMaxMigDeviceCount, self._handle) or 0
        handles = (self._ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, self._handle, n) for n in range(most))
        return [
            self._values(handle, f"{self._index}.{n}", split=False)
            for n, handle in enumerate(handles)
            if handle is not None
        ]

    def _values(self, handle: Any, gpu_id: str, *, split: bool) -> Gpu:
        nvml = self._nvml
        utilization = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperatureV, handle, nvml.NVML_TEMPERATURE_GPU)
        if temperature is None:  # an older driver
            temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        energy = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        used, total = (None, None) if split else self._memory(handle)
        return Gpu(
            gpu_id=gpu_id,
            index=self._index,
            uuid=self._ask(nvml.nvmlDeviceGetUUID, handle),
            name=self._ask(nvml.nvmlDeviceGetName, handle),
            utilization=None if utilization is None else utilization.gpu,
            memory_used=used,
            memory_total=total,
            temperature=temperature,
            power=None if power is None else power / 1000,
            energy=None if energy is None else energy / 1000,
            processes=None if split else self._processes(handle),
            split=split,
        )

    def _memory(self, handle: Any) -> tuple[int | None, int | None]:
        """Used and total. Version 1 counts what the driver reserves as used; old drivers know no other."""
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        memory = memory or self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        return (memory.used, memory.total) if memory is not None and memory.total else (None, None)

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        # The function without a version turns "not found" into an error that is no NVMLError.
        found = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
        return None if found is None else tuple(GpuProcess(pid=one.pid, memory=one.usedGpuMemory) for one in found)

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """None when this is not known here."""
        try:
            return call(*args)
        except self._nvml.NVMLError as error:
            if error.value in self._gone:
                raise
        except UnicodeDecodeError:  # a name that is no text
            pass
        return None


def _forget_library(nvml: Any) -> None:
    """The driver was replaced under us: the library in memory is the old one's, so the next start loads it anew.

    pynvml has no word for this.
    """
    if hasattr(_ctypes, "dlclose"):
        _ctypes.dlclose(nvml.nvmlLib._handle)  # noqa: SLF001
    nvml.nvmlLib = None
    nvml._nvmlGetFunctionPointer_cache.clear()  # noqa: SLF001
