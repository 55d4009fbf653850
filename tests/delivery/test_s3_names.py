"""Keys: safe, unique within a workflow, and the same whenever they are asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from managers.delivery.s3_names import METADATA, disposition, folder, names, safe
from managers.events.types import Output


def outputs(*filenames: str | None) -> list[Output]:
    return [Output(kind="image", node_id="1", filename=name) for name in filenames]


def test_names_stay_what_they_are_where_they_can() -> None:
    assert names(outputs("a_00001_.png", None, "clip 1.mp4", "größe.png")) == {
        0: "a_00001_.png",
        2: "clip_1.mp4",
        3: "größe.png",
    }


def test_no_two_are_the_same_and_none_is_the_description() -> None:
    assert list(names(outputs("a.png", "A.png", "a.png", "metadata.json", "x", "x")).values()) == [
        *("a.png", "A-2.png", "a-3.png"),
        *("metadata-2.json", "x", "x-2"),
    ]


@given(st.lists(st.text(max_size=300), max_size=20), st.text(max_size=40))
def test_whatever_comes_stays_in_its_folder(filenames: list[str], workflow_id: str) -> None:
    found = names(outputs(*filenames))
    assert found == names(outputs(*filenames))
    assert len({name.lower() for name in found.values()}) == len(filenames)
    for name in found.values():
        assert name not in ("", ".", "..", METADATA)
        assert not name.startswith(".")
        assert not set("/\\\0 ?#%*") & set(name)
        assert len(name.encode()) <= 200


def test_the_end_of_a_long_name_stays() -> None:
    assert safe("x" * 400 + ".png").endswith("x.png")
    assert len(safe("日" * 400 + ".png").encode()) <= 184


def test_the_folder_and_the_header() -> None:
    assert folder("generated/comfyui", "7") == "generated/comfyui/jobs/7"
    assert folder("", "7") == "jobs/7"
    assert disposition("a.png", inline=True) == 'inline; filename="a.png"'
    assert disposition("ö.svg", inline=False) == "attachment; filename=\"_.svg\"; filename*=UTF-8''%C3%B6.svg"
