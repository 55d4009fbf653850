"""A picture for the documentation of what the Grafana dashboard asks for, drawn by a real Prometheus:

    python -m tests.browser.panels docs/images

Needs what the screenshots need, and Debian's prometheus with its classic page. Takes some six minutes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import httpx
from PIL import Image

from tests.browser.kit import House, chromium, house, steps
from tests.browser.scene import NAMES, tell
from tests.gpu.driver import Driver, build
from tests.test_deploy import DEPLOY, prometheus

MINUTES = 5
PANELS = (
    "What becomes of workflows",
    "How long is the queue?",
    "How long do people wait?",
    "Is the GPU busy?",
    "Requests",
)
VARIABLES = {
    "$job": "comfyui", "$instance": ".+", "$__rate_interval": "1m", "$__interval": "15s", "$__range": "5m",
}  # fmt: skip


def queries() -> list[str]:
    """The first query of each of these panels, as Grafana would send it."""
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    found = {panel["title"]: panel["targets"][0]["expr"] for panel in board["panels"] if panel.get("targets")}
    texts = []
    for title in PANELS:
        text = found[title]
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        texts.append(text)
    return texts


async def work(home: House) -> None:
    """Somebody hands in more than one ComfyUI can do, now and then."""
    chance = random.Random(1)
    for n in itertools.count():
        fail = {"fail": "value_error", "fail_at_step": 2} if n % 9 == 8 else {}
        graph = steps(chance.randrange(5, 25), 0.2, **fail)
        await home.submit(graph, NAMES[n % len(NAMES)], priority=chance.choice(["high", "normal", "normal", "low"]))
        await asyncio.sleep(chance.expovariate(1 / 3))


async def cards(driver: Driver) -> None:
    for second in itertools.count():
        tell(driver, second)
        await asyncio.sleep(1)


async def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "driver").mkdir()
        (place / "prometheus").mkdir()
        driver = Driver(place / "driver", build(place))
        tell(driver, 0)
        with house(place, GPU_SAMPLE_SECONDS="1", **driver.environ) as home:
            config = (DEPLOY / "prometheus" / "prometheus.yml").read_text().replace("15s", "3s")
            config = config.replace("127.0.0.1:9090", urlsplit(home.url).netloc)
            (place / "prometheus" / "prometheus.yml").write_text(config)
            (place / "prometheus" / "rules.yml").write_text((DEPLOY / "prometheus" / "rules.yml").read_text())
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            with prometheus(place / "prometheus", address):
                running = [asyncio.create_task(work(home)), asyncio.create_task(cards(driver))]
                await asyncio.wait(running, timeout=60 * MINUTES, return_when=asyncio.FIRST_EXCEPTION)
                await _shoot(f"http://{address}", target / "prometheus-panels.png")
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)


async def _shoot(url: str, target: Path) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        (await client.get("/-/ready")).raise_for_status()
    asked: dict[str, str] = {}
    for n, text in enumerate(queries()):
        asked |= {f"g{n}.expr": text, f"g{n}.tab": "0", f"g{n}.range_input": f"{MINUTES}m", f"g{n}.stacked": "0"}
    async with chromium() as browser:
        page = await browser.new_page(viewport={"width": 1200, "height": 900})
        await page.goto(f"{url}/graph?{urlencode(asked)}", wait_until="networkidle")
        await page.add_style_tag(content="nav { display: none !important; }")
        await page.screenshot(path=target, full_page=True)
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
