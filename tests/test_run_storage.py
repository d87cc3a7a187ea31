"""Runs on a URL: an object per finished trial, and a resume from any machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from virtual_clock import in_process

from desisky_tune.cli.entry import main
from desisky_tune.errors import DataError, RunError, SearchInterrupted, StorageError
from desisky_tune.files import atomic_path
from desisky_tune.jobs import fetch_from_storage
from desisky_tune.search.backend import Assignment, Member
from desisky_tune.search.events import Event, TrialFinished
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.hyperparameters import is_documented_default
from desisky_tune.search.records import record_from_json
from desisky_tune.search.run import resume_search, run_search
from desisky_tune.search.space import load_spec
from desisky_tune.search.storage import RunMirror
from desisky_tune.search.trial_files import TrialFiles
from desisky_tune.search.warm_start import earlier_configurations

SMALL = (
    "search.default_first=false",
    "search.sampler=random",
    "search.scheduler=none",
    "search.trials=4",
    "evaluation.finalists=2",
    "evaluation.finalist_folds=2",
    "evaluation.finalist_seeds=1",
    "search.grace=20",
    "training.epochs=60",
    "resources.workers=1",
    "space.width=8",
    "space.depth=1",
    "space.batch_size=32",
)


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Take all copies of runs away, as on a machine that has never seen one."""

    def move() -> None:
        place = tmp_path / "another"
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))

    return move


def test_a_search_on_a_url_is_resumed_elsewhere_to_the_same_trials(
    ray_instance: Any, tmp_path: Path, another_machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load_spec("quick", overrides=SMALL)
    undisturbed = in_process(spec, tmp_path / "whole")
    url = f"file://{tmp_path}/bucket/runs"

    def die(event: Event) -> None:
        if isinstance(event, TrialFinished) and event.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SearchInterrupted, match=f"desisky-tune resume {url}/run"):
        run_search(spec, runs=url, name="run", on_event=die)
    there = tmp_path / "bucket" / "runs" / "run"
    before = sorted(path.name for path in (there / "ledger").iterdir())
    assert len(before) >= 2
    assert not (there / "evaluation.json").exists()

    another_machine()
    resumed = resume_search(f"{url}/run")
    assert [record.number for record in resumed.records] == [0, 1, 2, 3]
    for one, other in zip(resumed.records, undisturbed, strict=True):
        assert (one.configuration, one.objective) == (other.configuration, other.objective)
        assert one.curve == other.curve
    objects = sorted((there / "ledger").iterdir())
    assert [record_from_json(path.read_text()) for path in objects] == resumed.records
    assert (there / "best" / "run.eqx").read_bytes() == resumed.checkpoint.read_bytes()
    assert not list((there / "trials").glob("*.state"))
    assert not list(there.rglob("*.part"))

    assert main(["leaderboard", f"{url}/run", "--json"]) == 0
    board = json.loads(capsys.readouterr().out)
    assert {row["trial"] for row in board} == {0, 1, 2, 3}
    assert main(["export", f"{url}/run", str(tmp_path / "three.eqx"), "--trial", "3"]) == 0
    assert (tmp_path / "three.eqx").exists()
    # What it exported, which is there though none of it was made here.
    assert main(["export", f"{url}/run", str(tmp_path / "best.eqx")]) == 0
    kept = [
        path.read_bytes().split(b"\n", 1)[1]
        for path in (tmp_path / "best.eqx", there / "best" / "run.eqx")
    ]
    assert kept[0] == kept[1]
    assert main(["report", f"{url}/run"]) == 2
    best = str(tmp_path / "best.eqx")
    assert main(["evaluate", best, "--split-from", f"{url}/run", "--rows", "test"]) == 0
    ranked = [resumed.records[row["trial"]].configuration for row in board]
    taken = earlier_configurations(load_spec("quick"), [f"{url}/run"])
    assert taken == [each for each in ranked if not is_documented_default(each)]
    assert fetch_from_storage(url, "run", tmp_path / "fetched").is_dir()


def test_a_taken_name_is_refused_or_numbered(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/runs"
    first = RunFolder.create(url, "quick", exact=True)
    first.write_search({"spec": {}, "data": {}, "split": {}})
    assert first.place == f"{url}/quick"
    with pytest.raises(RunError, match=r"quick exists.*desisky-tune resume file://"):
        RunFolder.create(url, "quick", exact=True)
    assert RunFolder.create(url, "quick", exact=False).place == f"{url}/quick-2"


def test_a_url_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no search\.json"):
        RunFolder.open(f"file://{tmp_path}/none")


@pytest.mark.parametrize("name", ["..", "a%2f..", ".hidden", ""])
def test_a_name_on_a_url_cannot_leave_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run name"):
        RunFolder.open(f"file://{tmp_path}/runs/{name}/" if name else "file://")


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(DataError) as refused:
        RunFolder.create("s3://key:secret@bucket/runs", "quick", exact=True)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("command", ["report", "resume", "leaderboard"])
def test_a_signature_in_a_runs_url_is_refused_and_not_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="parameter 'sig'"):
        RunFolder.create("abfs://bucket/runs?sig=hidden", "quick", exact=True)
    assert main([command, "abfs://bucket/runs/quick?sig=hid/hidden"]) == 2
    out, err = capsys.readouterr()
    assert "abfs://bucket/runs/quick: a URL with the parameter 'sig'" in err
    assert "hid" not in out + err


def test_an_object_whose_name_leads_out_of_the_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = fsspec.filesystem("memory")
    run = "/bucket/escape/run"
    objects = {f"{run}/{name}": b"{}" for name in ("search.json", "best/run.eqx")}
    outside = {
        f"{run}/{name}": b"{}\n"
        for name in (
            "best/../../../../escaped",
            "best//escaped",
            "report/..\\..\\escaped",
            "ledger/../../escaped",
            "trials/../escaped.state",
        )
    }
    # As keys, which the storage itself takes literally.
    for path, content in (objects | outside).items():
        monkeypatch.setitem(files.store, path, MemoryFile(files, path, content))
    mirror = RunMirror.of("memory://bucket/escape", "run")
    mirror.pull()
    mirror.forget_states([])
    assert mirror.places() == ["best/run.eqx", "search.json"]
    assert (mirror.folder / "best" / "run.eqx").read_bytes() == b"{}"
    assert (mirror.folder / "ledger.jsonl").read_bytes() == b""
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]
    assert set(outside) <= set(files.store)


def test_what_storage_refuses_is_an_error_that_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    mirror = RunMirror(f"file://{tmp_path}/runs/quick", tmp_path)
    with pytest.raises(StorageError, match=r"ledger/00001\.json cannot be written"):
        mirror.put_json("ledger/00001.json", {})


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunMirror:
    """A run on a URL as a node has it that has not seen it yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mirror = RunMirror.of(f"file://{tmp_path}/runs", "quick")
    shutil.rmtree(mirror.folder.parents[1])
    return mirror


def write_state(mirror: RunMirror) -> None:
    """Keep a state as what trains does."""

    def write(path: Path) -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"state")

    files = TrialFiles(mirror.folder / "trials", mirror)
    files.write_state(Assignment(1, {}, seed=0), Member(), write)


def test_a_copy_is_its_users_alone_on_each_node(mirror: RunMirror) -> None:
    write_state(mirror)
    assert mirror.places() == ["trials/00001.state"]
    assert mirror.folder.parents[1].stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["others may write it", "a link", "a file", "somebody else's"])
def test_a_copy_is_put_nowhere_else(
    what: str, mirror: RunMirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = mirror.folder.parents[1]
    if what == "a link":
        place.symlink_to(tmp_path)
    elif what == "a file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777 if what == "others may write it" else 0o700)
    if what == "somebody else's":
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(RunError, match=r"must be a folder that only you can write"):
        write_state(mirror)
    with pytest.raises(RunError, match=r"must be a folder that only you can write"):
        mirror.fetch(mirror.folder / "trials" / "00001.state")
    if what != "somebody else's":
        with pytest.raises(RunError, match=r"must be a folder that only you can write"):
            RunMirror.of(f"file://{tmp_path}/runs", "quick")


def test_whether_a_url_can_be_written_is_seen_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "runs" / "quick"
    mirror = RunMirror(f"file://{there}", tmp_path / "copy")
    with pytest.raises(StorageError, match=r"quick/search\.json is gone"):
        mirror.check()
    assert not there.exists()
    mirror.put_json("search.json", {})
    mirror.check()
    assert [path.name for path in there.iterdir()] == ["search.json"]
    monkeypatch.setattr(RunMirror, "remove", lambda mirror, place: None)
    mirror.check()
    assert len(list(there.iterdir())) == 2
    # Of a driver that was killed just then.
    assert mirror.places() == ["search.json"]


def test_the_copy_of_a_specification_is_never_ahead_of_the_url(tmp_path: Path) -> None:
    folder = RunFolder.create(f"file://{tmp_path}/runs", "quick", exact=True)
    folder.write_search({"name": "quick"})
    written = tmp_path / "runs" / "quick" / "search.json"
    assert written.read_bytes() == folder.search_json.read_bytes()
    written.rename(tmp_path / "away")
    written.mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        folder.write_search({"name": "quick", "finalists": {}})
    assert folder.search_json.read_bytes() == (tmp_path / "away").read_bytes()


def test_objects_by_fsspec_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files = PyFileSystem(FSSpecHandler(fsspec.filesystem("file")))
    monkeypatch.setattr(
        "desisky_tune.search.storage.open_storage", lambda url: (files, str(tmp_path / "run"))
    )
    mirror = RunMirror("other://bucket/run", tmp_path / "copy")
    mirror.put_bytes("trials/00001.state", b"state")
    assert mirror.places() == ["trials/00001.state"]
    assert mirror.read("trials/00001.state") == b"state"
    assert mirror.fetch(tmp_path / "copy" / "trials" / "00001.state")
    assert not mirror.fetch(tmp_path / "copy" / "trials" / "00002.state")
