"""The graphics cards: what they do now, and what a workflow cost them.

`GpuManager` is what the house uses. Must never be asked to wait: a driver that hangs hurts nobody but its own thread.
"""

from managers.events.types import Cost, GpuView, MemoryView
from managers.gpu.manager import GpuConfig, GpuManager
from managers.gpu.values import Gpu, GpuProcess, GpuStatus, Sample

__all__ = [
    "Cost",
    "Gpu",
    "GpuConfig",
    "GpuManager",
    "GpuProcess",
    "GpuStatus",
    "GpuView",
    "MemoryView",
    "Sample",
]
