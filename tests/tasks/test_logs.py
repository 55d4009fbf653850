"""The log of a program: its parts, lines and offsets, without a program."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from managers.processes import logs
from managers.processes.logs import Chunk, Line, Lines
from managers.processes.supervisor import LOG, Log


def told() -> None:
    """Nobody needs to know."""


def read_all(folder: Path, offset: int = 0, most: int = 64) -> tuple[list[Line], int]:
    """Every line from there on, and where the first of them begins."""
    found: list[Line] = []
    lines, first = Lines(offset), None
    while True:
        chunk = logs.read(folder, lines.offset, most)
        if not chunk.data:
            return found + list(lines.rest()), offset if first is None else first
        first = chunk.start if first is None else first
        found += lines.feed(chunk)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_the_end_of_what_was_said(tmp_path: Path, seed: int) -> None:
    """In whole lines, within the size, at offsets that never change; in pieces of any size, over many parts."""
    dice = random.Random(seed)
    said = [f"{n}:" + "x" * dice.randrange(60) for n in range(dice.randrange(1, 200))]
    output = "".join(line + "\n" for line in said).encode()
    cap = 500
    log = Log(tmp_path, cap, told)
    at = 0
    while at < len(output):
        size = dice.choice((1, 7, 100, 1000))
        log.write(output[at : at + size])
        at += size
        assert sum(path.stat().st_size for path in tmp_path.glob("output.*.log")) <= cap

    lines, first = read_all(tmp_path, most=dice.choice((1, 50, 10_000)))
    assert [line.text for line in lines] == said[len(said) - len(lines) :]
    assert len(output) - first > min(len(output), cap // 2 - 64) - 1, "no more is let go than is needed"
    for line in lines:
        assert output[: line.end].endswith(line.text.encode() + b"\n")
        assert read_all(tmp_path, line.end)[0] == [later for later in lines if later.end > line.end]
    assert (tmp_path / LOG).read_bytes() == output[len(output) - len((tmp_path / LOG).read_bytes()) :]
    assert logs.tail(tmp_path, 3).splitlines() == said[-3:]
    assert [line.text for line in read_all(tmp_path, logs.tail_offset(tmp_path, 3))[0]] == said[-3:]


def test_a_line_longer_than_a_part_goes_on_in_the_next(tmp_path: Path) -> None:
    log = Log(tmp_path, 400, told)
    log.write(b"before\n" + b"y" * 250 + b"\nafter\n")
    assert [line.text for line in read_all(tmp_path)[0]] == ["y" * 250, "after"]
    assert log.lost == 0


def test_a_program_that_is_started_again_goes_on_in_the_same_log(tmp_path: Path) -> None:
    Log(tmp_path, 1000, told).write(b"first\nand a beg")
    Log(tmp_path, 1000, told).write(b"inning\n")
    assert [line.text for line in read_all(tmp_path)[0]] == ["first", "and a beginning"]
    assert len(list(tmp_path.glob("output.*.log"))) == 1


def test_a_disk_that_is_full_costs_the_rest_of_the_output_only(tmp_path: Path) -> None:
    log = Log(tmp_path, 1000, told)
    log.write(b"first\n")
    with Path("/dev/full").open("wb", buffering=0) as full:
        log._file = os.dup(full.fileno())
        log.write(b"lost\n")
    assert log.lost == 5
    assert [line.text for line in read_all(tmp_path)[0]] == ["first"]


def test_lines_of_unusual_length_come_in_pieces() -> None:
    lines = Lines(0)
    size = 300 * 1024
    found = list(lines.feed(Chunk(0, b"z" * size)))
    assert [(len(line.text), line.end) for line in found] == [(size, size)]
    assert list(lines.feed(Chunk(size, b"z\nnext\n"))) == [Line("z", size + 2), Line("next", size + 7)]


def test_what_is_no_text_is_told_as_well_as_can_be() -> None:
    assert list(Lines(0).feed(Chunk(0, b"a\xffb\r\n\x00\n"))) == [Line("a\ufffdb", 5), Line("\x00", 7)]


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    assert logs.read(tmp_path, 0) == Chunk(0, b"")
    assert (logs.tail(tmp_path), logs.tail_offset(tmp_path)) == ("", 0)
