"""The service as a process of its own, for tests that kill it. Prints its URL when it accepts connections."""

import asyncio
import os
import sys

from management_api.app import create_app
from management_api.settings import load
from tests.serving import serve


async def main() -> None:
    async with serve(create_app(load(os.environ, None))) as port:
        sys.stdout.write(f"http://127.0.0.1:{port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
