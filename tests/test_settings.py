"""The environment becomes settings, or one clear line (CONTRACT 1, 9)."""

from __future__ import annotations

from pathlib import Path

import pytest

from management_api.settings import MASK, SettingsError, describe, load, markdown_table
from management_api.values import BackendSettings
from management_api.variables import VARIABLES

KEY = {"MANAGEMENT_API_KEY": "correct horse"}
DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"


def test_defaults_are_those_of_the_contract() -> None:
    settings = load(KEY, None)
    assert (settings.api.host, settings.api.port) == ("0.0.0.0", 9090)
    assert settings.api.rate_limit == "100/minute"
    assert settings.api.max_body == 10 * 2**20
    assert settings.api.rate_limit_allow == settings.api.trusted_proxies == settings.api.cors_allowed_origins == ()
    assert settings.api.metrics_auth is False
    assert settings.api.data_dir.is_absolute()
    assert settings.comfyui.backends == (BackendSettings("local", "http://127.0.0.1:8188"),)
    home = Path("~/comfyui").expanduser()
    assert settings.comfyui.outputs == home / "output"
    assert settings.comfyui.models.upscale == home / "models" / "upscale_models"
    assert settings.comfyui.models.checkpoints == home / "models" / "checkpoints"
    assert (settings.comfyui.timeout, settings.comfyui.max_queue) == (3600, 10000)
    assert (settings.comfyui.priority_aging, settings.comfyui.prefetch) == (600, True)
    assert settings.comfyui.free_when_idle_seconds == 0
    assert (settings.log.level, settings.log.format) == ("info", "auto")


@pytest.mark.parametrize("environ", [{}, {"MANAGEMENT_API_KEY": ""}])
def test_no_key_no_start(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="MANAGEMENT_API_KEY"):
        load(environ, None)
    assert load(environ, None, require_key=False).api.key == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MANAGEMENT_API_PORT", "80a"),
        ("MANAGEMENT_API_PORT", "65536"),
        ("MANAGEMENT_API_PORT", "-1"),
        ("MANAGEMENT_API_PORT", "９０"),
        ("MANAGEMENT_API_HOST", "http://x"),
        ("MANAGEMENT_API_RATE_LIMIT", "fast"),
        ("MANAGEMENT_API_RATE_LIMIT", "0/minute"),
        ("MANAGEMENT_API_RATE_LIMIT_ALLOW", "10.0.0.0/33"),
        ("MANAGEMENT_API_TRUSTED_PROXIES", "proxy.example"),
        ("MANAGEMENT_API_METRICS_AUTH", "maybe"),
        ("MANAGEMENT_API_MAX_BODY", "10MB"),
        ("MANAGEMENT_API_MAX_BODY", "0"),
        ("MANAGEMENT_API_SHUTDOWN_SECONDS", "-1"),
        ("CORS_ALLOWED_ORIGINS", "example.com"),
        ("CORS_ALLOWED_ORIGINS", "https://example.com/path"),
        ("COMFYUI_URL", "127.0.0.1:8188"),
        ("COMFYUI_URL", "http://host:port"),
        ("COMFYUI_URL", "http://[::1"),
        ("COMFYUI_URL", "http://host/?a=b"),
        ("COMFYUI_PORT", "0"),
        ("COMFYUI_BACKENDS", "http://127.0.0.1:8188"),
        ("COMFYUI_BACKENDS", "a=http://x,a=http://y"),
        ("COMFYUI_BACKENDS", "Upper=http://x"),
        ("COMFYUI_BACKENDS", "a=x"),
        ("COMFYUI_BACKENDS", ","),
        ("COMFYUI_TIMEOUT", "0"),
        ("COMFYUI_TIMEOUT", "nan"),
        ("COMFYUI_TIMEOUT", "inf"),
        ("COMFYUI_TIMEOUT", "1h"),
        ("COMFYUI_MAX_QUEUE", "0"),
        ("COMFYUI_PRIORITY_AGING", "-5"),
        ("COMFYUI_PREFETCH", "2"),
        ("COMFYUI_FREE_WHEN_IDLE_SECONDS", "soon"),
        ("COMFYUI_OUTPUTS", "a\0b"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_value_is_one_line_with_name_value_and_what_is_allowed(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({**KEY, name: value}, None)
    line = str(caught.value)
    assert line.startswith(f"{name}={value!r} is not understood: give ")
    assert "\n" not in line
    assert len(line.partition(": give ")[2]) > 5


def test_secrets_are_in_no_message_and_no_row() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"MANAGEMENT_API_KEY": "s3cret\n"}, None)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        load({**KEY, "COMFYUI_BACKENDS": "a=http://user:s3cret@x,A=http://y"}, None)
    assert "s3cret" not in str(caught.value)

    environ = {"MANAGEMENT_API_KEY": "s3cret", "COMFYUI_URL": "https://user:s3cret@gpu.example:8443/comfy/"}
    settings = load(environ, None)
    rows = {row.name: row for row in describe(settings)}
    assert settings.comfyui.backends[0].url == "https://user:s3cret@gpu.example:8443/comfy"
    assert rows["MANAGEMENT_API_KEY"].value == MASK
    assert rows["COMFYUI_URL"].value == f"https://{MASK}@gpu.example:8443/comfy"
    assert "s3cret" not in repr(describe(settings))


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "MANAGEMENT_API_KEY='of the file'\nMANAGEMENT_API_PORT=1\nexport LOG_LEVEL=warn # loud\nCOMFY_PATH=$HOME/x\n"
    )
    settings = load({"MANAGEMENT_API_PORT": "2", "LOG_FORMAT": ""}, file)
    assert (settings.api.key, settings.api.port, settings.log.level) == ("of the file", 2, "warning")
    sources = {row.name: row.source for row in describe(settings)}
    assert sources["MANAGEMENT_API_PORT"] == "environment"
    assert sources["MANAGEMENT_API_KEY"] == sources["LOG_LEVEL"] == ".env"
    assert sources["LOG_FORMAT"] == sources["MANAGEMENT_API_HOST"] == "default"


def test_a_missing_file_is_fine_and_an_unreadable_one_is_told(tmp_path: Path) -> None:
    assert load(KEY, tmp_path / ".env").api.key == "correct horse"
    (tmp_path / ".env").write_bytes(b"MANAGEMENT_API_KEY=\xff\xfe\n")
    with pytest.raises(SettingsError, match=r"\.env"):
        load({}, tmp_path / ".env")


def test_backends_go_before_url_before_host_and_port() -> None:
    parts = {"COMFYUI_HOST": "::1", "COMFYUI_PORT": "8199"}
    assert load({**KEY, **parts}, None).comfyui.backends == (BackendSettings("local", "http://[::1]:8199"),)
    parts["COMFYUI_URL"] = "https://gpu.example/"
    assert load({**KEY, **parts}, None).comfyui.backends == (BackendSettings("local", "https://gpu.example"),)
    parts["COMFYUI_BACKENDS"] = "local=http://127.0.0.1:8188, salad=https://x.example/y/,"
    assert load({**KEY, **parts}, None).comfyui.backends == (
        BackendSettings("local", "http://127.0.0.1:8188"),
        BackendSettings("salad", "https://x.example/y"),
    )


def test_folders_lie_below_comfy_path_unless_named() -> None:
    environ = {**KEY, "COMFY_PATH": "/srv/comfy", "COMFYUI_MODELS_VAE": "/mnt/vae"}
    comfyui = load(environ, None).comfyui
    assert comfyui.outputs == Path("/srv/comfy/output")
    assert comfyui.models.loras == Path("/srv/comfy/models/loras")
    assert comfyui.models.vae == Path("/mnt/vae")


def test_networks_origins_and_off() -> None:
    environ = {
        **KEY,
        "MANAGEMENT_API_RATE_LIMIT": "off",
        "MANAGEMENT_API_TRUSTED_PROXIES": "10.1.2.3/8, ::1",
        "CORS_ALLOWED_ORIGINS": "https://a.example, http://localhost:3000",
        "MANAGEMENT_API_MAX_BODY": "1MiB",
    }
    api = load(environ, None).api
    assert api.rate_limit is None
    assert [str(network) for network in api.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert api.cors_allowed_origins == ("https://a.example", "http://localhost:3000")
    assert api.max_body == 2**20


def test_every_variable_has_a_row_and_rows_can_be_read_back() -> None:
    settings = load(KEY, None)
    rows = {row.name: row.value for row in describe(settings)}
    assert list(rows) == [variable.name for variable in VARIABLES]
    again = load({name: value for name, value in rows.items() if name not in KEY} | KEY, None)
    assert (again.api, again.comfyui, again.log) == (settings.api, settings.comfyui, settings.log)


def test_the_documentation_has_this_table() -> None:
    assert markdown_table() in DOCS.read_text("utf-8"), "docs/configuration.md: paste markdown_table() again"
