"""A run's folder: its name, its creation, and what survives a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desisky_tune.errors import RunError
from desisky_tune.search.folder import RunFolder, valid_run_name

NAMES = st.one_of(st.text(max_size=120), st.text(alphabet="ab.-_/~ \\", max_size=8))


@given(NAMES)
def test_no_name_leaves_the_folder(name: str) -> None:
    try:
        valid_run_name(name)
    except RunError:
        return
    assert (Path("/runs") / name).resolve() == Path(f"/runs/{name}")
    assert name.isprintable()


def test_a_new_run_takes_the_next_free_name(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        folder = RunFolder.create(tmp_path, "quick", exact=False)
        folder.write_search({"name": folder.name})
        names.append(folder.name)
    assert names == ["quick", "quick-2", "quick-3"]


def test_a_name_asked_for_is_never_changed(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "mine", exact=True).write_search({})
    with pytest.raises(RunError, match="mine exists"):
        RunFolder.create(tmp_path, "mine", exact=True)


def test_a_run_opens_by_its_search_json(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunError, match=r"no search\.json"):
        RunFolder.open(tmp_path)
    folder = RunFolder.create(tmp_path, "quick", exact=True)
    folder.write_search({"name": "quick"})
    content = {"spec": {}, "data": {}, "split": {}}
    folder.write_search(content)
    assert RunFolder.open(folder.path).read_search() == {"schema": 1, **content}


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', "{", '{"schema": 1, "spec": {}}'])
def test_another_schema_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(RunError, match=r"search\.json"):
        RunFolder.open(tmp_path).read_search()


def test_started_trials_survive_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note_started(0, {"width": 8})
    with open(folder.started, "ab") as stream:
        stream.write(json.dumps({"number": 1, "configuration": {"width": 16}}).encode()[:20])
    folder.note_started(2, {"width": 32})
    assert folder.read_started() == {0: {"width": 8}, 2: {"width": 32}}


def test_a_search_that_was_killed_at_its_start_leaves_its_name_free(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "mine", exact=True)
    with folder.lock():
        folder.features.write_bytes(b"table")
    assert RunFolder.create(tmp_path, "mine", exact=True) == folder


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "mine", exact=True)
    with folder.lock(), pytest.raises(RunError, match="in use"), folder.lock():
        pass
    with folder.lock():
        pass
