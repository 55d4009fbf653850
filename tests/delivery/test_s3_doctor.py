"""`management-api doctor` looks at the bucket as the service would use it, and leaves nothing there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.delivery.s3_kit import BUCKET, KEY_ID, SECRET, needs_rclone, s3_server
from tests.program import run

pytestmark = [needs_rclone, pytest.mark.slow]


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({}, f"✓ bucket {BUCKET}: takes objects, and their links open"),
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            f"✗ bucket {BUCKET}: the store refuses our credentials: 403 SignatureDoesNotMatch",
        ),
        (
            {"S3_PUBLIC_ENDPOINT_URL": "http://127.0.0.1:9"},
            f"! bucket {BUCKET}: takes objects, but their link does not open from here (ConnectError)",
        ),
    ],
)
def test_one_line(environ: dict[str, str], line: str, tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as server:
        ended = run(tmp_path, "doctor", **server.environ(**environ))
        assert line in ended.out.splitlines()
        assert server.keys("") == []
    assert SECRET not in ended.out + ended.err
    assert KEY_ID not in ended.out + ended.err
