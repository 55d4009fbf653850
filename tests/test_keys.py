"""Named keys: the file and its commands, and what the service makes of them (issue line "Keys", CONTRACT 1, 2)."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from management_api.keys import KeyRing, KeysError, add_key, read_keys, revoke_key
from managers.callers import KeyScope
from tests.program import KEY as PROGRAM_KEY
from tests.program import Ended, run, served
from tests.queue_kit import PATH
from tests.serving import Log
from tests.store_kit import ManualClock

READ, SUBMIT, ADMIN = KeyScope.READ, KeyScope.SUBMIT, KeyScope.ADMIN
DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"
STREAM = "/v1/comfyui/stream"
A_KEY = re.compile(r"cma_[A-Za-z0-9_-]{43}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the keys are kept; nothing is there yet."""
    return tmp_path / "keys.toml"


# ---- the commands


@pytest.fixture
def keys(tmp_path: Path, file: Path) -> Callable[..., Ended]:
    """`keys("add", …)`: the command as a process."""
    return lambda *args, **environ: run(
        tmp_path, "keys", *args, **{"MANAGEMENT_API_KEYS_FILE": str(file), "MANAGEMENT_API_KEY": "", **environ}
    )


def test_add_prints_the_key_once_and_keeps_its_hash(keys: Callable[..., Ended], file: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    options = ("--scope", "submit,read", "--rate-limit", "1000/minute", "--max-queued", "50", "--expires", "90d")
    ended = keys("add", "shop", *options)
    assert ended.status == 0, ended.err
    key = ended.out.removesuffix("\n")
    assert A_KEY.fullmatch(key)
    assert key not in ended.err
    assert "only time" in ended.err

    text = file.read_text()
    assert key not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = read_keys(file)[0]["shop"]
    assert found.sha256 == sha256(key.encode()).hexdigest()
    assert (found.scopes, found.rate_limit, found.max_queued) == ((READ, SUBMIT), "1000/minute", 50)
    assert before <= found.created_at <= datetime.now(UTC)
    assert found.expires_at is not None
    assert timedelta(0) <= found.expires_at - found.created_at - timedelta(days=90) <= timedelta(seconds=2)

    assert keys("add", "board", "--scope", "read").out != ended.out
    assert list(read_keys(file)[0]) == ["shop", "board"]
    listed = keys("list")
    assert listed.status == 0
    assert [re.split(r"  +", line)[:4] for line in listed.out.splitlines()] == [
        ["NAME", "SCOPES", "RATE LIMIT", "MAX QUEUED"],
        ["shop", "read,submit", "1000/minute", "50"],
        ["board", "read", "-", "-"],
    ]
    assert found.sha256 not in listed.out
    assert not A_KEY.search(listed.out + listed.err)


def test_revoke_takes_one_out(keys: Callable[..., Ended], file: Path) -> None:
    for name in ("one", "two"):
        assert keys("add", name, "--scope", "admin").status == 0
    ended = keys("revoke", "one")
    assert (ended.status, ended.out) == (0, "")
    assert "one is revoked" in ended.err
    assert list(read_keys(file)[0]) == ["two"]
    assert keys("revoke", "one").status == 1
    assert keys("revoke", "two").status == 0
    empty = keys("list")
    assert (empty.status, empty.out, empty.err) == (0, "", f"There are no keys in {file}\n")


def test_what_cannot_be_done_is_one_line(keys: Callable[..., Ended], file: Path) -> None:
    assert keys("add", "shop", "--scope", "read").status == 0
    text = file.read_bytes()
    for args, status, words in (
        (("add", "shop", "--scope", "read"), 1, "There is a key shop"),
        (("add", "admin", "--scope", "read"), 1, "MANAGEMENT_API_KEY"),
        (("add", "a b", "--scope", "read"), 1, "1 to 64 of A-Z"),
        (("add", "../x", "--scope", "read"), 1, "1 to 64 of A-Z"),
        (("add", "x", "--scope", "read", "--rate-limit", "fast"), 1, "like 100/minute"),
        (("add", "x", "--scope", "read", "--max-queued", "0"), 1, "1 or more"),
        (("add", "x", "--scope", "read", "--file", f"{file.parent}/none/keys.toml"), 1, "No such file or directory"),
        (("revoke", "y"), 1, "no key of this name"),
        (("list", "--file", f"{file.parent}/none"), 1, "is not there"),
        (("revoke", "x", "--file", f"{file.parent}/none"), 1, "is not there"),
        (("add", "x", "--scope", "write"), 2, "read, submit, admin"),
        (("add", "x"), 2, "--scope"),
        (("add", "x", "--scope", "read", "--expires", "soon"), 2, "12h or 90d"),
        (("add", "x", "--scope", "read", "--expires", "0d"), 2, "12h or 90d"),
        ((), 2, "ACTION"),
    ):
        ended = keys(*args)
        assert (ended.status, ended.out) == (status, ""), (args, ended.err)
        assert words in ended.lines[-1], (args, ended.err)
        assert status == 2 or len(ended.lines) == 1, "usage has more lines"
    nowhere = keys("list", MANAGEMENT_API_KEYS_FILE="")
    assert (nowhere.status, nowhere.out) == (1, "")
    assert "Set MANAGEMENT_API_KEYS_FILE, or give --file" in nowhere.err
    file.write_text("[shop]\nscopes = 7\n")
    assert keys("add", "x", "--scope", "read").status == 1, "what is not understood is not replaced"
    assert file.read_text() == "[shop]\nscopes = 7\n"
    file.write_bytes(text)
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is left behind"


def test_the_file_is_named_by_an_option_the_environment_or_dotenv(keys: Callable[..., Ended], tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    assert keys("add", "a", "--scope", "read", "--file", str(other)).status == 0
    (tmp_path / ".env").write_text(f"MANAGEMENT_API_KEYS_FILE={other}\n")
    assert keys("list", MANAGEMENT_API_KEYS_FILE="").out.splitlines()[1].startswith("a ")
    wrong = keys("list", MANAGEMENT_API_PORT="web")
    assert (wrong.status, len(wrong.lines)) == (1, 1)
    assert keys("list", "--file", str(other), MANAGEMENT_API_PORT="web").status == 0


def test_what_a_link_leads_to_is_replaced(file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file.symlink_to(tmp_path / "real" / "keys.toml")
    add_key(file, "a", scopes=[READ])
    add_key(file, "b", scopes=[READ])
    assert file.is_symlink()
    assert list(read_keys(tmp_path / "real" / "keys.toml")[0]) == ["a", "b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_file_stays_its_owners(file: Path) -> None:
    add_key(file, "a", scopes=[READ])
    os.chown(file, 12345, 12346)
    add_key(file, "b", scopes=[READ])
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_changes_at_once_are_all_kept_and_nobody_sees_half_a_file(file: Path) -> None:
    add_key(file, "first", scopes=[READ])
    done = threading.Event()

    def watch() -> int:
        seen = 0
        while not done.is_set():
            seen = max(seen, len(read_keys(file)[0]))
        return seen

    with ThreadPoolExecutor(9) as pool:
        watching = pool.submit(watch)
        made = list(pool.map(lambda n: add_key(file, f"k{n}", scopes=[READ]), range(24)))
        done.set()
        assert watching.result() >= 1
    assert len(set(made)) == 24
    assert set(read_keys(file)[0]) == {"first", *(f"k{n}" for n in range(24))}


HASH = sha256(b"cma_some-key").hexdigest()
GOOD = f'sha256 = "{HASH}"\nscopes = ["read"]\ncreatedAt = 2026-11-22T10:00:00Z\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[shop", r"Expected ']'"),
        (b"\xff", r"utf-8"),
        ("shop = 1", r"shop stands outside"),
        ("[shop]", r"\[shop\]: .*sha256"),
        (f"[shop]\n{GOOD}maxqueued = 5", r"\[shop\]: .*maxqueued"),
        (f"[shop]\n{GOOD}maxQueued = 0", r"\[shop\]: .*maxQueued"),
        (f"[shop]\n{GOOD}rateLimit = 'fast'", r"\[shop\]: .*100/minute"),
        (f"[shop]\n{GOOD}expiresAt = 2027-01-01", r"\[shop\]: .*expiresAt"),
        (f"[shop]\n{GOOD}expiresAt = 2027-01-01T10:00:00", r"\[shop\]: .*expiresAt"),
        (f"[shop]\n{GOOD}".replace('"read"', '"write"'), r"\[shop\]: .*scopes"),
        (f"[shop]\n{GOOD}".replace('"read"', ""), r"\[shop\]: .*scopes"),
        (f"[shop]\n{GOOD}".replace(HASH, HASH.upper()), r"\[shop\]: .*sha256"),
        (f"[shop]\n{GOOD}".replace(HASH, "cma_some-key"), r"\[shop\]: .*sha256"),
        (f"[admin]\n{GOOD}", r"\[admin\]: .*MANAGEMENT_API_KEY"),
        (f"['a b']\n{GOOD}", r"1 to 64"),
        (f"[one]\n{GOOD}[two]\n{GOOD}", r"\[two\] is the same key as \[one\]"),
        (f"[one]\n{GOOD}[one]\n{GOOD}", r"one"),
        ("#" * (2**20 + 1), r"larger"),
    ],
)
def test_a_file_that_is_wrong_says_where(file: Path, text: str | bytes, words: str) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KeysError, match=words) as caught:
        read_keys(file)
    line = str(caught.value)
    assert line.startswith(str(file))
    assert "\n" not in line
    assert HASH not in line
    assert "cma_some" not in line


def test_no_file_is_told_as_such(file: Path, tmp_path: Path) -> None:
    for path, words in ((file, "is not there"), (tmp_path, "cannot be read|is no file")):
        with pytest.raises(KeysError, match=words):
            read_keys(path)
    os.mkfifo(file)
    with pytest.raises(KeysError, match="is no file"):
        read_keys(file)


# ---- the ring: what is good now


def test_the_ring_looks_once_a_second_and_keeps_what_was_good(file: Path, log: Log) -> None:
    clock = ManualClock()
    one = add_key(file, "one", scopes=[READ]).encode()
    ring = KeyRing(file, clock)
    caller = ring.find(one)
    assert caller is not None
    assert caller.name == "one"
    two = add_key(file, "two", scopes=[SUBMIT]).encode()
    clock.now += 999
    assert ring.find(two) is None, "not looked again yet"
    clock.now += 1
    found = ring.find(two)
    assert found is not None
    assert (found.name, set(found.scopes)) == ("two", {SUBMIT})

    revoke_key(file, "one")
    clock.now += 1000
    assert ring.find(one) is None
    assert not caller.welcome()
    good = file.read_bytes()
    for broken in (b"[two", b"", None, b"[two"):
        if broken:
            file.write_bytes(broken)
        elif broken is None:
            file.unlink()
        for _ in range(3):
            clock.now += 1000
            assert ring.find(two) is not None
            assert ring.find(one) is None
    errors = [line for line in log.lines() if line["level"] == "error"]
    assert len(errors) == 3, "once for each state of the file"
    assert all(str(file) in line["reason"] for line in errors)
    file.write_bytes(good + f"[three]\n{GOOD}".encode())
    clock.now += 1000
    assert ring.find(two) is not None
    assert log.lines()[-1]["keys"] == ["two", "three"]
    file.write_bytes(b"# nobody")
    clock.now += 1000
    assert ring.find(two) is None, "an empty file is a good one"
    assert not A_KEY.search(log.stream.getvalue())


def test_a_key_that_expires_and_one_that_loses_a_scope(file: Path) -> None:
    clock = ManualClock()
    end = datetime.fromtimestamp(clock.now / 1000 + 60, UTC)
    short = add_key(file, "short", scopes=[READ], expires_at=end).encode()
    wide = add_key(file, "wide", scopes=[READ, SUBMIT]).encode()
    ring = KeyRing(file, clock)
    first, second = ring.find(short), ring.find(wide)
    assert first is not None
    assert second is not None
    clock.now += 59_999
    assert ring.find(short) is not None
    assert first.welcome()
    clock.now += 1
    assert ring.find(short) is None
    assert not first.welcome()

    assert second.welcome()
    file.write_text(file.read_text().replace('["read","submit"]', '["submit"]'))
    clock.now += 1000
    assert not second.welcome()
    file.write_text(file.read_text().replace('["submit"]', '["admin"]'))
    clock.now += 1000
    assert second.welcome(), "admin holds all of them"


def test_only_what_looks_like_a_key_of_ours_is_looked_up(file: Path) -> None:
    weak = b"letmein"
    file.write_text(f"[weak]\n{GOOD}".replace(HASH, sha256(weak).hexdigest()))
    ring = KeyRing(file, ManualClock())
    assert ring.find(weak) is None, "a plain hash is no shelter for a word"
    assert ring.find(b"") is None
    assert ring.find(b"cma_" + b"x" * 60_000) is None


# ---- the process


@pytest.mark.parametrize(("text", "words"), [(None, "is not there"), ("[shop]\nscopes = 7", r"\[shop\]")])
def test_a_wrong_file_stops_the_start_with_one_line(tmp_path: Path, file: Path, text: str | None, words: str) -> None:
    if text is not None:
        file.write_text(text)
    ended = run(tmp_path, "serve", MANAGEMENT_API_KEYS_FILE=str(file))
    assert (ended.status, ended.out, len(ended.lines)) == (1, "", 1), ended.err
    assert re.match(f"MANAGEMENT_API_KEYS_FILE: {re.escape(str(file))}.*{words}", ended.err)


def test_the_doctor_looks_at_the_file(tmp_path: Path, file: Path) -> None:
    add_key(file, "shop", scopes=[READ])
    assert f"✓ named keys: 1 in {file}" in run(tmp_path, "doctor", MANAGEMENT_API_KEYS_FILE=str(file)).out
    file.write_text("[shop")
    assert f"✗ named keys: {file}: " in run(tmp_path, "doctor", MANAGEMENT_API_KEYS_FILE=str(file)).out


def test_a_running_service_follows_the_commands(tmp_path: Path, keys: Callable[..., Ended], file: Path) -> None:
    file.write_text("")
    with (
        served(tmp_path, MANAGEMENT_API_KEYS_FILE=str(file), LOG_FORMAT="json") as (url, process),
        httpx.Client(base_url=url, trust_env=False) as client,
    ):

        def asked(key: str) -> int:
            return client.get(PATH, headers={"Authorization": f"Bearer {key}"}).status_code

        def becomes(key: str, status: int) -> bool:
            end = datetime.now(UTC) + timedelta(seconds=10)
            while asked(key) != status:
                assert datetime.now(UTC) < end
            return True

        key = keys("add", "shop", "--scope", "read").out.strip()
        assert becomes(key, 200)
        assert keys("revoke", "shop").status == 0
        assert becomes(key, 401)
        assert asked(PROGRAM_KEY) == 200
        shown = run(tmp_path, "config", MANAGEMENT_API_KEYS_FILE=str(file)).out
        assert re.search(rf"^MANAGEMENT_API_KEYS_FILE +{re.escape(str(file))} +environment$", shown, re.MULTILINE)
    assert key not in "\n".join(process.seen)
