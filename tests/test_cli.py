"""The command: what it prints where, its exit codes, and the library behind each of its words."""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer

import desisky_tune
from desisky_tune.cli import main
from desisky_tune.cli.app import app
from desisky_tune.cli.console import duration, number, one_line, printable, table
from desisky_tune.cli.progress import LineProgress, LiveProgress, Tally
from desisky_tune.data.columns import BANDS, TARGETS
from desisky_tune.errors import DataError, SearchError
from desisky_tune.search.events import (
    DataReady,
    Event,
    Note,
    SearchFinished,
    SearchStarted,
    TrialFinished,
    TrialReported,
)
from desisky_tune.search.records import TrialRecord

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "cli.md"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def commands() -> dict[str, Any]:
    """Every command by its full name, the groups included."""
    found: dict[str, Any] = {}

    def visit(command: Any, name: str) -> None:
        found[name] = command
        for word, child in getattr(command, "commands", {}).items():
            visit(child, f"{name} {word}".strip())

    visit(typer.main.get_command(app), "")
    return found


# ------------------------------------------------------------------- help and documentation


@pytest.mark.parametrize("name", [name for name in commands() if name])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"Usage: desisky-tune {name}" in out
    assert err == ""
    assert not CONTROL.search(out)


@pytest.mark.parametrize("name", [name for name in commands() if name])
def test_every_command_and_option_is_documented(name: str) -> None:
    text = DOCUMENTATION.read_text()
    heading = f"desisky-tune {name}"
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]
    (section,) = [s for s in sections if s.splitlines()[0].strip("` ") == heading]
    for param in commands()[name].params:
        if param.param_type_name == "argument":
            assert f"`{param.metavar}`" in section
        else:
            for option in param.opts:
                # Common to all commands, and documented once.
                where = text if option in ("--help", "-h", "--debug") else section
                assert f"`{option}" in where, option


def test_the_documentation_names_no_command_or_option_that_is_not_there() -> None:
    text = DOCUMENTATION.read_text()
    known = commands()
    for line in re.findall(r"^desisky-tune .*$", text, flags=re.MULTILINE):
        words = line.split("#")[0].split()[1:]
        if words[0].startswith("-"):
            continue
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        assert name in known, line
        options = {option for param in known[name].params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out
    assert main(["data"]) == 0
    assert "simulate" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"desisky-tune {desisky_tune.__version__}\n"


def test_help_answers_well_under_a_second() -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "desisky_tune", "--help"], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - began)
    # The fastest: a busy machine makes the others slower.
    assert min(seconds) < 0.8


# --------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DataError("rows 3 and 4 disagree"), 2),
        (SearchError("no trial completed"), 1),
        (RuntimeError("out of luck"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    failure: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.delenv("DESISKY_TUNE_DEBUG", raising=False)
    monkeypatch.setattr("desisky_tune.search.run.run_search", fail)
    assert main(["search"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("desisky-tune: ")
    assert err.count("\n") == 1
    assert str(failure) in err


@pytest.mark.parametrize("how", ["option", "option before the command", "environment"])
def test_debug_shows_where(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise DataError("rows 3 and 4 disagree")

    monkeypatch.setattr("desisky_tune.search.run.run_search", fail)
    if how == "environment":
        monkeypatch.setenv("DESISKY_TUNE_DEBUG", "1")
    argv = {"option": ["search", "--debug"], "environment": ["search"]}
    assert main(argv.get(how, ["--debug", "search"])) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("desisky-tune: error: rows 3 and 4 disagree\n")


def test_a_message_of_several_lines_becomes_one() -> None:
    assert one_line("a.yaml: width: wrong\n\n  b:   also wrong\n") == (
        "a.yaml: width: wrong; b: also wrong"
    )


def test_the_process_ends_with_the_code_of_its_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "desisky_tune", "data", "info", "none.csv"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "desisky-tune: error: none.csv: no such file\n"


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    script = f"{sys.executable} -m desisky_tune search --help | head -c 10"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "Usage: des"
    assert done.stderr == ""


# ------------------------------------------------------------------------ options and spec


def spec_of(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The specification and the options that `search` hands on."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def remember(spec: Any, **options: Any) -> None:
        seen.append((spec, options))
        raise SearchError("that was all")

    monkeypatch.setattr("desisky_tune.search.run.run_search", remember)
    assert main(["search", *argv]) == 1
    return seen[0]


def test_short_options_stand_for_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = "--trials 7 --epochs 90 --seed 3 --workers 2 --gpus 0.5 --time-limit 1h30m --subset dark"
    spec, options = spec_of(
        [*argv.split(), "--data", "my data: [1].csv", "--runs", str(tmp_path), "--name", "mine"],
        monkeypatch,
    )
    assert (spec.search.trials, spec.training.epochs) == (7, 90)
    assert (spec.search.seed, spec.training.seed) == (3, 3)
    assert (spec.resources.workers, spec.resources.gpus_per_trial) == (2, 0.5)
    assert spec.search.time_limit == 5400
    assert (spec.data.source, spec.data.subset) == ("my data: [1].csv", "dark")
    assert (str(options["runs"]), options["name"]) == (str(tmp_path), "mine")
    assert (options["address"], options["dashboard"]) == (None, False)


def test_set_overrides_any_field_and_a_short_option_counts_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, _ = spec_of(
        ["--set", "space.depth.high=4", "--set", "search.trials=9", "--trials", "8"], monkeypatch
    )
    assert spec.space["depth"].high == 4
    assert spec.search.trials == 8


def test_a_space_is_named_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert spec_of([], monkeypatch)[0].name == "quick"
    assert spec_of(["broadband"], monkeypatch)[0].name == "broadband"
    (tmp_path / "mine.yaml").write_text("search: {trials: 3}\n")
    assert spec_of([str(tmp_path / "mine.yaml")], monkeypatch)[0].search.trials == 3


def test_a_cluster_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _, options = spec_of(["--address", "auto", "--dashboard"], monkeypatch)
    assert (options["address"], options["dashboard"]) == ("auto", True)


# ------------------------------------------------------------------------------- progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(trial: int, objective: float | None, state: str = "COMPLETE") -> TrialRecord:
    configuration = {
        "width": 64,
        "depth": 3,
        "learning_rate": 1e-3,
        "huber_delta": 0.25,
        "batch_size": 32,
    }
    reason = None if objective is not None else "the RMSE was not finite"
    rmse = None if objective is None else dict.fromkeys(BANDS, objective)
    return TrialRecord(
        number=trial,
        state=state,  # type: ignore[arg-type]
        configuration=configuration,
        objective=objective,
        reason=reason,
        best_epoch=1,
        epochs=50,
        rmse=rmse,
        seconds=8.0,
        seed=0,
        started=0.0,
        ended=0.0,
    )


def story() -> list[Event]:
    """A search of four trials, one of them from an earlier session."""
    first, second, third = record(1, 0.4), record(2, None, "FAIL"), record(3, 0.3)
    return [
        DataReady(
            rows={"train": 60, "validation": 20, "test": 20},
            nights={"train": 6, "validation": 2, "test": 2},
            v_derived=True,
            provenance={
                "source": "sv1",
                "subset": "moon",
                "rows_read": 120,
                "removed": {"MOONALT > 5": 19, "magnitude missing": 1, "feature missing": 0},
            },
        ),
        SearchStarted("quick", Path("runs/quick"), 4, 50, 2, finished=1),
        TrialReported(1, 10, 0.5),
        TrialReported(1, 50, 0.4),
        TrialFinished(first, 2, 4, first),
        TrialFinished(second, 3, 4, first),
        Note("something to know"),
        TrialFinished(third, 4, 4, third),
        SearchFinished(Path("runs/quick"), Path("best.eqx"), 75.0, {"COMPLETE": 3, "FAIL": 1}),
    ]


def test_one_plain_line_per_event() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = LineProgress(lines.append, clock)
    for event in story():
        clock.now += 10
        progress(event)
    text = "\n".join(lines)
    assert not CONTROL.search(text)
    assert "100 exposures of 120 (removed: MOONALT > 5 19; magnitude missing 1)" in lines[0]
    assert lines[1] == (
        "split: train 60 exposures in 6 nights, validation 20 exposures in 2 nights, "
        "test 20 exposures in 2 nights"
    )
    assert "V is derived" in lines[2]
    assert "4 trials of up to 50 epochs, 1 of them finished before, 2 at a time" in lines[3]
    assert lines[4] == "trial 1 at epoch 10: RMSE 0.5000 mag"
    assert lines[5].startswith("[2/4] trial 1 COMPLETE after 50 epochs, RMSE 0.4000 mag")
    # One trial took the 30 s of this session; two are left.
    assert lines[5].endswith("best RMSE 0.4000 mag (trial 1), about 1 min 0 s left")
    assert "FAIL: the RMSE was not finite" in lines[6]
    assert lines[7] == "note: something to know"
    assert lines[8].endswith("best RMSE 0.3000 mag (trial 3)")
    assert lines[9] == "search finished in 1 min 15 s: 3 COMPLETE, 1 FAIL"
    assert len(lines) == 10


def test_a_tally_knows_the_trials_that_run() -> None:
    tally = Tally()
    tally.see(TrialReported(7, 25, 0.5))
    tally.see(TrialReported(8, 75, 0.5))
    assert tally.running_text() == "trial 7 at epoch 25, trial 8 at epoch 75"
    tally.see(TrialFinished(record(7, 0.4), 1, 2, None))
    assert tally.running_text() == "trial 8 at epoch 75"


def test_a_terminal_shows_done_best_left_and_running() -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[status]}", markup=False))
    with Progress(*columns, console=console) as bar:
        progress = LiveProgress(bar)
        for event in story()[:5]:
            progress(event)
        progress(TrialReported(3, 10, 0.45))
        progress(TrialFinished(record(4, None, "FAIL"), 3, 4, record(1, 0.4)))
        bar.refresh()
        shown = screen.getvalue()
        assert "trial 4 FAIL: the RMSE was not finite" in shown
        assert "3/4" in shown
        assert "best RMSE 0.4000 mag (trial 1)" in shown
        assert "left" in shown
        assert "trial 3 at epoch 10" in shown
        assert "search quick: 4 trials" in shown


def test_what_a_terminal_draws_with_need_not_be_pickled(tmp_path: Path) -> None:
    # Ray Tune pickles the search's recorder; a terminal holds locks and streams.
    from rich.progress import Progress

    from desisky_tune.search.folder import RunFolder
    from desisky_tune.search.recorder import Recorder

    recorder = Recorder(
        RunFolder(tmp_path),
        [record(1, 0.4)],
        total=2,
        max_epochs=50,
        max_deaths=1,
        deaths=Counter(),
        seed=0,
        emit=LiveProgress(Progress(disable=True)),
    )
    assert pickle.loads(pickle.dumps(recorder)).records == recorder.records


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables_align_and_missing_numbers_are_dashes() -> None:
    text = table(["model", "RMSE"], [["a", number(0.25, ".2f")], ["longer", number(float("nan"))]])
    assert text.splitlines() == ["model   RMSE", "a       0.25", "longer     -"]


def test_control_characters_are_not_obeyed() -> None:
    assert printable("a\x1b[31mb\nc") == "a\\x1b[31mb\nc"


# ------------------------------------------------------------------- from search to figures

SMALL = [
    *("--set", "space.width={choices: [8, 16, 128]}"),
    *("--set", "space.depth={low: 1, high: 2}"),
    *("--set", "search.grace=3", "--set", "search.reduction=3"),
    *("--set", "evaluation.finalists=0"),
    *("--trials", "4", "--epochs", "9", "--workers", "1"),
]


@pytest.fixture(scope="module")
def searched(ray_instance: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A small real search: its run, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = main(["search", *SMALL, "--runs", str(runs), "--name", "small"])
    assert code == 0, err.getvalue()
    return runs / "small", out.getvalue(), err.getvalue()


def test_a_search_ends_with_board_checkpoint_and_figures(
    searched: tuple[Path, str, str],
) -> None:
    run, out, err = searched
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"checkpoint: {run / 'best' / 'small.eqx'}" in out
    assert (run / "best" / "small.eqx").is_file()
    assert "V (derived)" in out
    for part in ("validation", "test"):
        for model in ("winner", "constant"):
            figures = evaluation["figures"][model][part]
            row = [figures[name] for name in (*BANDS, "mean", "mean_grz")]
            (line,) = re.findall(rf"^{model} +{part} +(.*)$", out, flags=re.MULTILINE)
            assert [float(value) for value in line.split()[: len(row)]] == pytest.approx(
                row, abs=6e-5
            )
    assert not CONTROL.search(out + err)
    assert "[4/4]" in err


def test_after_a_search_ctrl_c_interrupts_again(searched: tuple[Path, str, str]) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_board_holds_the_ledgers_trials(
    searched: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched[0]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert main(["leaderboard", str(run), "--json", "--all"]) == 0
    board = json.loads(capsys.readouterr().out)
    assert {row["trial"]: row["objective"] for row in board} == {
        entry["number"]: entry["objective"] for entry in ledger
    }
    assert main(["leaderboard", str(run), "--csv"]) == 0
    complete = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    expected = sorted(e["objective"] for e in ledger if e["state"] == "COMPLETE")
    assert [float(row["objective"]) for row in complete] == expected
    assert main(["leaderboard", str(run)]) == 0
    assert "V (derived)" in capsys.readouterr().out.splitlines()[0]


def test_an_export_predicts_for_a_table_of_any_format(
    searched: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "out.eqx"
    assert main(["export", str(searched[0]), str(checkpoint)]) == 0
    assert main(["data", "ingest", "sv1", str(tmp_path / "in.parquet")]) == 0
    predictions = []
    source = tmp_path / "in.parquet"
    for suffix in ("csv", "ecsv", "fits", "parquet"):
        out = tmp_path / f"out.{suffix}"
        assert main(["predict", str(checkpoint), str(source), str(out)]) == 0
        before = source.read_bytes()
        assert main(["predict", str(checkpoint), str(source), str(source)]) == 2
        assert source.read_bytes() == before
        from desisky_tune.data import read_table

        frame = read_table(out)
        predictions.append(frame[[f"SKY_MAG_{band}_PRED" for band in "VGRZ"]].to_numpy(float))
        source = out  # what was written can be read again
    for other in predictions[1:]:
        np.testing.assert_allclose(other, predictions[0], atol=1e-6)
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "out.parquet")


def test_an_evaluation_repeats_the_searchs_figures(
    searched: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched[0]
    checkpoint = str(run / "best" / "small.eqx")
    expected = json.loads((run / "evaluation.json").read_text())["figures"]
    for source in (["--split-from", str(run)], []):
        argv = ["evaluate", checkpoint, "--rows", "validation", "--json", *source]
        assert main(argv) == 0
        found = json.loads(capsys.readouterr().out)["figures"]
        for ours, theirs in (("checkpoint", "winner"), ("constant", "constant")):
            rmse = [found[ours][band]["rmse"] for band in BANDS]
            assert rmse == pytest.approx([expected[theirs]["validation"][b] for b in BANDS])


def test_an_evaluation_is_read_by_people_too(
    searched: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched[0]
    assert main(["evaluate", str(run / "best" / "small.eqx"), "--split-from", str(run)]) == 0
    out = capsys.readouterr().out
    for word in ("RMSE", "bias", "NMAD", "beyond 0.4 mag", "classical", "constant", "V (derived)"):
        assert word in out
    nights = pd.read_parquet(run / "features.parquet")["NIGHT"].unique()
    assert set(re.findall(r"^(20\d{6}) ", out, flags=re.MULTILINE)) == {str(n) for n in nights}


def test_training_with_a_trials_configuration_repeats_its_curve(
    searched: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched[0]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    trial = next(e for e in ledger if e["state"] == "COMPLETE" and e["number"] > 0)
    out = tmp_path / "again.eqx"
    argv = ["train", "--from-run", str(run), "--trial", str(trial["number"]), "--out", str(out)]
    assert main([*argv, "--json", "--print-every", "4"]) == 0
    printed, told = capsys.readouterr()
    again = json.loads(printed)
    assert again["curve"] == trial["curve"]
    assert again["objective"] == trial["objective"]
    assert len(re.findall(r"^epoch \d+:", told, flags=re.MULTILINE)) == 3
    exported = tmp_path / "exported.eqx"
    assert main(["export", str(run), "--trial", str(trial["number"]), str(exported)]) == 0
    leaves = [path.read_bytes().partition(b"\n")[2] for path in (out, exported)]
    assert leaves[0] == leaves[1]


def test_training_takes_its_own_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.eqx"
    argv = "train --width 8 --depth 1 --learning-rate 0.01 --huber-delta 0.5 --batch-size 16"
    argv += " --schedule cosine --warmup 0.2 --final-rate 0.1 --weight-decay 0.01"
    argv += " --gradient-clip 0.1 --early-stopping 4"
    assert main([*argv.split(), "--epochs", "5", "--seed", "1", "--out", str(out)]) == 0
    assert "V (derived)" in capsys.readouterr().out
    with open(out, "rb") as stream:
        header = json.loads(stream.readline())
    assert header["arch"] == {"in_size": 6, "out_size": 4, "width_size": 8, "depth": 1}
    config = header["training"]["config"]
    expected = {"epochs": 5, "learning_rate": 0.01, "huber_delta": 0.5, "batch_size": 16}
    expected |= {"schedule": "cosine", "warmup": 0.2, "final_rate": 0.1, "weight_decay": 0.01}
    expected |= {"gradient_clip": 0.1, "early_stopping": 4}
    assert {name: config[name] for name in expected} == expected
    assert header["seed"] == 1
    assert "search" not in header


def test_ctrl_c_leaves_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from desisky_tune.cli import model_commands

    def stop_at_ten(progress: Any) -> None:
        if progress.epochs == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_commands, "_print_progress", stop_at_ten)
    out = tmp_path / "stopped.eqx"
    argv = ["train", "--width", "8", "--depth", "1", "--print-every", "5", "--out", str(out)]
    assert main(argv) == 130
    assert f"interrupted after 10 epochs; the best so far is in {out}" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--rows", "test"]) == 0


def test_an_interrupted_search_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from desisky_tune.errors import SearchInterrupted

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise SearchInterrupted(Path("runs/quick"), 3, 8)

    monkeypatch.setattr("desisky_tune.search.run.run_search", interrupted)
    assert main(["search"]) == 130
    err = capsys.readouterr().err
    assert "after 3 of 8 trials" in err
    assert "desisky-tune resume runs/quick" in err


def test_a_finished_run_resumes_to_its_result(
    searched: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = searched[0]
    assert main(["resume", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(run / "best" / "small.eqx")
    assert result["evaluation"] == json.loads((run / "evaluation.json").read_text())
    assert len(result["leaderboard"]) == 4


# ----------------------------------------------------------------------------------- data


def test_info_counts_the_subsets(capsys: pytest.CaptureFixture[str]) -> None:
    from desisky_tune.data.features import source_path

    frame = pd.read_csv(source_path("sv1"))
    clear = frame["TRANSPARENCY_GFA"] > 0
    dark = frame[(frame["SUNALT"] < -20) & (frame["MOONALT"] < -5) & clear]
    assert main(["data", "info", "sv1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["rows"] == len(frame)
    assert content["v_derived"] is True
    assert content["subsets"]["dark"]["rows"] == len(dark)
    assert content["subsets"]["dark"]["median"]["z"] == pytest.approx(dark[TARGETS[3]].median())
    assert main(["data", "info"]) == 0
    assert str(len(dark)) in capsys.readouterr().out


def test_a_simulated_catalogue_goes_all_the_way(
    ray_instance: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cache" / "astropy").mkdir(parents=True)  # astropy wants it to exist
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vac, again, features = (tmp_path / name for name in ("vac.fits", "again.fits", "out.parquet"))
    for path in (vac, again):
        assert main(["data", "simulate", "--exposures", "60", "--seed", "4", str(path)]) == 0
    assert vac.read_bytes() == again.read_bytes()
    assert main(["data", "info", str(vac)]) == 0
    assert "60 exposures" in capsys.readouterr().out
    assert main(["data", "ingest", str(vac), "--subset", "all", str(features)]) == 0
    frame = pd.read_parquet(features)
    assert frame["EXPID"].is_monotonic_increasing
    assert f"{len(frame)} exposures of 60" in capsys.readouterr().err


def test_fetch_accepts_a_file_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dr1" / "sky_spectra_vac_v1.fits"
    path.parent.mkdir()
    path.write_bytes(b"placed by hand")
    assert main(["data", "fetch", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
