"""What a node is to the simulator: its results, its context while it runs, its errors, and the registry.

Node code lives in the modules `images`, `probes` and `pretend`; it sees the world only through `Context`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

import msgspec
from PIL.Image import Image

from management_api.simulator.folders import Folders
from management_api.simulator.options import SimulatorOptions
from management_api.simulator.sockets import Picture

T = TypeVar("T")
Batch = list[Image]
"""What travels on an IMAGE link: RGB pictures of equal size."""
Inputs = dict[str, Any]
POLL_SECONDS: Final = 0.05


class Interrupted(Exception):
    """The interrupt flag was up when it was looked at."""


class NodeFailure(Exception):
    """A failure of a node whose type is to be shown under another name (a library that is not installed here)."""

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(text)
        self.type_name = type_name


class Blocked(msgspec.Struct, frozen=True):
    """A value that keeps its consumers from running; the first of them reports the message."""

    message: str | None


class Result(msgspec.Struct, frozen=True):
    """What a node gives: its outputs, what the user sees of it, and perhaps a graph that does its work instead.

    With `expand` the outputs may be links into that graph.
    """

    outputs: tuple[Any, ...] = ()
    ui: dict[str, list[Any]] | None = None
    expand: dict[str, Any] | None = None


class Interrupt:
    """The one interrupt flag of the process (PROTOCOL 2, `POST /interrupt`)."""

    def __init__(self) -> None:
        self.up = False

    def check(self) -> None:
        """Raise Interrupted, and take the flag down, when it is up."""
        if self.up:
            self.up = False
            raise Interrupted


class Reporter(Protocol):
    """Who passes on what a node tells while it runs."""

    def progress(self, node_id: str, value: float, maximum: float, picture: Picture | None) -> None:
        """Tell how far a node is."""

    def text(self, node_id: str, text: str) -> None:
        """Show a text below a node."""


class Context:
    """The world of one running node."""

    def __init__(
        self,
        *,
        node_id: str,
        folders: Folders,
        options: SimulatorOptions,
        interrupt: Interrupt,
        reporter: Reporter,
        prompt: dict[str, Any],
        extra_pnginfo: object,
    ) -> None:
        self.node_id = node_id
        self.folders = folders
        self.prompt = prompt
        self.extra_pnginfo = extra_pnginfo
        self.options = options
        self._interrupt = interrupt
        self._reporter = reporter

    def progress(self, value: float, maximum: float, picture: Picture | None = None) -> None:
        """Report progress. Raises Interrupted: each update looks at the flag."""
        self._interrupt.check()
        self._reporter.progress(self.node_id, value, maximum, picture)

    def text(self, text: str) -> None:
        """Show a text below the node (binary frame 3)."""
        self._reporter.text(self.node_id, text)

    async def sleep(self, seconds: float) -> None:
        """Sleep, looking at the interrupt flag every 50 ms. Raises Interrupted."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            self._interrupt.check()
            left = end - loop.time()
            if left <= 0:
                return
            await asyncio.sleep(min(left, POLL_SECONDS))

    async def heavy(self, work: Callable[..., T], *args: object) -> T:
        """Run picture work on a thread, so that HTTP stays responsive."""
        return await asyncio.get_running_loop().run_in_executor(None, work, *args)


Run = Callable[[Context, Inputs], Awaitable[Result]]


class NodeClass(msgspec.Struct, frozen=True):
    """One class: how it runs, whether other nodes may run meanwhile, what else makes it differ from before."""

    name: str
    run: Run
    concurrent: bool = False
    fingerprint: Callable[[Folders, Inputs], str] | None = None
    validate: Callable[[Folders, Inputs], tuple[str, str] | None] | None = None
    """Own check of inputs at submit: (input name, complaint) or None. Its inputs skip the list check."""


REGISTRY: Final[dict[str, NodeClass]] = {}


def node(
    name: str,
    *,
    concurrent: bool = False,
    fingerprint: Callable[[Folders, Inputs], str] | None = None,
    validate: Callable[[Folders, Inputs], tuple[str, str] | None] | None = None,
) -> Callable[[Run], Run]:
    """Register the decorated coroutine function as the node class `name`."""

    def register(run: Run) -> Run:
        REGISTRY[name] = NodeClass(name, run, concurrent, fingerprint, validate)
        return run

    return register
