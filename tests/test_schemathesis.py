"""Every operation of the OpenAPI description, with data made from it, right and wrong, against the real service with
a real ComfyUI process behind it: what comes back is what the description says, whatever was sent.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.program import KEY, served
from tests.queue_kit import PATH, picture
from tests.simulator_process import simulator

# DELETE on a workflow cancels it, and its record stays. What a schema cannot say is refused with 400 or 422: a name
# that no backend has, a cursor that we never gave, a graph that cannot run, metadata that is too long, a first
# day after the last, an address that nobody may call, inputs that the graph has not, a model that is not installed.
# Nobody waits for pictures here: the ComfyUI is busy with hundreds of them.
CONFIG = """
warnings = false

[checks]
use_after_free.enabled = false

[phases.stateful]
max-steps = 5

[[operations]]
include-name = [
  "GET /v1/comfyui/workflow", "GET /v1/comfyui/outputs", "GET /v1/comfyui/output/{path}",
  "HEAD /v1/comfyui/output/{path}", "DELETE /v1/comfyui/output/{path}", "POST /v1/comfyui/workflow", "POST /v1/tasks",
  "POST /v1/comfyui/inputs",
  "GET /v1/usage", "GET /v1/deliveries", "POST /v1/webhooks", "PATCH /v1/webhooks/{webhook_id}",
]
checks.positive_data_acceptance.expected-statuses = ["2xx", "304", "400", "404", "409", "416", "422"]

[[operations]]
include-path-regex = "^/v1/(generate|templates)"
parameters = { "query.wait" = 0.1 }
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "409", "422"]
"""
# A task whose program is not installed is a 503, and that is right: so there is one.
PROVIDERS = f"""
builtin = false
[providers.claude-flow]
argv = ["{sys.executable}", "-I", "-S", "-c", "pass", "--", "{{agent}}", "{{task}}"]
max_concurrent = 1000
"""
OPTIONS = (
    f"--header=X-API-Key: {KEY}",
    "--max-examples=15",
    "--seed=1",
    "--no-color",
    "--continue-on-failure",
    "--request-timeout=10",
)
SECONDS = 240


@pytest.mark.slow
def test_every_door_does_what_its_description_says(tmp_path: Path) -> None:
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "providers.toml").write_text(PROVIDERS)
    programs = {"MANAGEMENT_API_PROVIDERS_FILE": str(tmp_path / "providers.toml")}
    with (
        simulator(tmp_path / "comfyui") as (comfyui, _),
        served(tmp_path, COMFYUI_URL=comfyui, LOG_LEVEL="debug", LOG_FORMAT="json", **programs) as (url, process),
        httpx.Client(base_url=url, headers={"X-API-Key": KEY}) as client,
    ):
        for _ in range(2):  # something to list and to read
            assert client.post(PATH, json={"workflow": picture()}, headers={"Prefer": "wait=20"}).status_code == 200
        found = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/docs/json", *OPTIONS],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr
        assert client.get("/health").status_code == 200
    errors = [line for line in process.seen if '"level":"error"' in line]
    assert not errors, errors[:5]
    assert KEY not in "".join(process.seen)
