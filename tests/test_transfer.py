"""Transfer in a search: the space file, given weights, and whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from desisky_tune import load_run
from desisky_tune.cli import main
from desisky_tune.data.columns import BANDS, FEATURES, TARGETS
from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_split
from desisky_tune.errors import (
    CheckpointError,
    InputError,
    MissingFileError,
    RunError,
    SpaceError,
)
from desisky_tune.inference import Predictor
from desisky_tune.io import checkpoint_meta, load_model, read_header, save
from desisky_tune.models import make_broadbandMLP, permute_inputs
from desisky_tune.search.final_fit import FinalFit, fit_of, write_final_fit
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.given_weights import read_given
from desisky_tune.search.origin import SearchRun, open_run, write_run
from desisky_tune.search.pretraining import (
    open_pretraining,
    prepare_pretraining,
)
from desisky_tune.search.records import Ledger, record_to_json
from desisky_tune.search.run import SearchResult, resume_search, run_search
from desisky_tune.search.single import repeated_training, train_single
from desisky_tune.search.space import (
    PretrainSpec,
    default_configuration,
    load_spec,
    resolved_dict,
    spec_from_dict,
)
from desisky_tune.visualization.contents import facts

#: So small that weights stay where they are: float32 cannot hold the change.
STANDSTILL = 1e-12


# --- the space file -----------------------------------------------------------------------------


def test_the_short_form_names_the_source_alone() -> None:
    short = load_spec("quick", ["pretrain=simulated"])
    assert short.pretrain == PretrainSpec(source="simulated")
    more = load_spec("quick", ["pretrain=simulated", "pretrain.epochs=7"])
    assert more.pretrain == PretrainSpec(source="simulated", epochs=7)
    assert load_spec("quick").pretrain is None
    for spec in (short, more, load_spec("quick")):
        assert spec_from_dict(json.loads(json.dumps(resolved_dict(spec)))) == spec


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pretrain={epochs: 3}"], ["pretrain.source", "is missing"]),
        (["pretrain={source: simulated, epoch: 3}"], ["pretrain.epoch", "'epochs'"]),
        (["pretrain=simulated", "pretrain.epochs=0"], ["pretrain.epochs = 0", "at least 1"]),
        (["pretrain=simulated", "pretrain.exposures=9"], ["exposures = 9", "at least 200"]),
        (
            ["pretrain=nowhere/at-all"],
            ["'nowhere/at-all'", "no such run or checkpoint", "simulated"],
        ),
        (["pretrain=nowhere.eqx"], ["'nowhere.eqx'", "no such run or checkpoint"]),
        (
            ["pretrain=simulated", "space={width: 128, depth: 5, learning_rate: 1e-4}"],
            ["pretrain", "documented default alone"],
        ),
    ],
)
def test_a_section_that_says_nothing_useful_is_refused(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        load_spec("quick", overrides)
    assert len(str(refused.value).splitlines()) == 1
    for word in words:
        assert word in str(refused.value)


# --- given weights ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Any:
    return load_features()


def a_checkpoint(path: Path, features: Any = FEATURES, outputs: int = 4, **extra: Any) -> Path:
    model = make_broadbandMLP(in_size=len(features), out_size=outputs, width_size=12, depth=2)
    return save(path, model, checkpoint_meta(model, features=features, **extra))


def spec_for(path: Path, *overrides: str) -> Any:
    return load_spec("quick", ["space={learning_rate: {low: 1e-4, high: 1e-2}}",
                               f"pretrain={path}", *overrides])  # fmt: skip


def test_given_weights_settle_width_and_depth(tmp_path: Path) -> None:
    spec = spec_for(a_checkpoint(tmp_path / "w.eqx"))
    assert (spec.space["width"].value, spec.space["depth"].value) == (12, 2)
    assert spec.is_pretrained({**default_configuration(), "width": 12, "depth": 2})
    assert not spec.is_pretrained(default_configuration())


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("space.width={choices: [12, 24]}", ["space.width", "[12, 24]", "have width 12"]),
        ("space.depth={low: 1, high: 3}", ["space.depth", "have depth 2", "--set space.depth=2"]),
        ("space.width=24", ["space.width = 24", "have width 12", "--set space.width=12"]),
    ],
)
def test_a_searched_architecture_is_refused(
    field: str, words: list[str], table: Any, tmp_path: Path
) -> None:
    spec = spec_for(a_checkpoint(tmp_path / "w.eqx"), field)
    with pytest.raises(SpaceError) as refused:
        prepare_pretraining(spec, table, make_split(table.frame))
    assert len(str(refused.value).splitlines()) == 1
    for word in words:
        assert word in str(refused.value)


def test_weights_of_other_features_or_bands_are_refused(table: Any, tmp_path: Path) -> None:
    split = make_split(table.frame)
    other = a_checkpoint(tmp_path / "f.eqx", (*FEATURES[:5], "AIRMASS"))
    with pytest.raises(CheckpointError, match=r"AIRMASS; data.features: MOONSEP"):
        read_given(spec_for(other), table, split)
    three = a_checkpoint(tmp_path / "b.eqx", outputs=3)
    with pytest.raises(CheckpointError, match=r"3 outputs.*needed: V, g, r, z"):
        read_given(spec_for(three), table, split)
    swapped = a_checkpoint(tmp_path / "s.eqx", bands=["z", "r", "g", "V"])
    with pytest.raises(CheckpointError, match=r"z, r, g, V\); needed: V, g, r, z"):
        read_given(spec_for(swapped), table, split)
    whole = a_checkpoint(tmp_path / "t.eqx")
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"truncated"):
        read_given(spec_for(whole), table, split)


def test_simulated_pretraining_needs_simulated_features(table: Any) -> None:
    spec = load_spec("quick", ["pretrain=simulated", "data.features=[MOONALT, HUMIDITY]"])
    with pytest.raises(InputError, match=r"HUMIDITY is not simulated.*allowed: NIGHT, EXPID"):
        prepare_pretraining(spec, table, make_split(table.frame))


def test_settings_of_the_simulation_do_not_go_with_given_weights(tmp_path: Path) -> None:
    path = a_checkpoint(tmp_path / "w.eqx")
    with pytest.raises(SpaceError, match=r"pretrain.epochs = 3: is of pretrain.source = simulated"):
        spec_for(path, "pretrain.epochs=3")


def test_weights_that_saw_test_rows_are_refused(table: Any, tmp_path: Path) -> None:
    split = make_split(table.frame, seed=0)
    drawn = split.as_exposures(table.frame)
    allowed = read_given(spec_for(a_checkpoint(tmp_path / "a.eqx", split=drawn)), table, split)
    seen = {"train": len(split.train), "validation": len(split.validation), "test": 0}
    assert allowed.note["seen"] == seen
    stolen = {**drawn, "train": [*drawn["train"], drawn["test"][4]]}
    with pytest.raises(
        SpaceError, match=rf"trained on 1 of the .* \(EXPID {drawn['test'][4]} first"
    ):
        read_given(spec_for(a_checkpoint(tmp_path / "b.eqx", split=stolen)), table, split)
    # What earlier weights were trained on counts, however many trainings lie between.
    chain = {"split": {**drawn, "train": [], "validation": []}}
    chain["pretrain"] = {"trained_on": stolen["train"]}
    with pytest.raises(SpaceError, match=r"trained on 1 of the"):
        read_given(spec_for(a_checkpoint(tmp_path / "c.eqx", **chain)), table, split)
    unknown = read_given(spec_for(a_checkpoint(tmp_path / "d.eqx")), table, split)
    assert unknown.note["seen"] is None
    assert unknown.note["trained_on"] is None


def test_inputs_in_another_order_are_put_into_the_search_s(table: Any, tmp_path: Path) -> None:
    order = (*FEATURES[3:], *FEATURES[:3])
    path = a_checkpoint(tmp_path / "w.eqx", order)
    split = make_split(table.frame)
    spec = spec_for(path)
    run = a_run(tmp_path, spec, table, split)
    inputs, _ = table.arrays(split.train[:20])
    kept, _ = load_model("broadband", path=run.folder.pretrained / "given.eqx")
    expected = permute_inputs(load_model("broadband", path=path)[0], order, FEATURES)
    np.testing.assert_array_equal(jax.vmap(kept)(inputs), jax.vmap(expected)(inputs))


def a_run(tmp_path: Path, spec: Any, table: Any, split: Any) -> SearchRun:
    run = SearchRun(RunFolder.create(tmp_path / "runs", "made", exact=True), spec, table, split)
    prepared = prepare_pretraining(spec, table, split)
    assert prepared is not None
    prepared.write(run.folder, spec.data.features)
    write_run(run, prepared.note)
    return run


def test_a_final_fit_begins_with_the_weights_too(table: Any, tmp_path: Path) -> None:
    path = a_checkpoint(tmp_path / "w.eqx")
    run = a_run(tmp_path, spec_for(path), table, make_split(table.frame))
    configuration = {**run.spec.fixed_configuration(), "learning_rate": STANDSTILL}
    fit = FinalFit(configuration, 1, 0, {}, 0.0, {})
    written = write_final_fit(run, fit, tmp_path / "final.eqx")
    predicted = [Predictor.load(each).predict(table.frame) for each in (written, path)]
    np.testing.assert_allclose(*predicted, atol=1e-4)
    assert read_header(written)["pretrain"]["source"] == str(path)


def test_a_run_that_lost_its_given_weights_says_so(table: Any, tmp_path: Path) -> None:
    run = a_run(
        tmp_path, spec_for(a_checkpoint(tmp_path / "w.eqx")), table, make_split(table.frame)
    )
    (tmp_path / "w.eqx").unlink()
    assert open_pretraining(open_run(run.folder.path)) is not None
    (run.folder.pretrained / "given.eqx").unlink()
    with pytest.raises(RunError, match=r"given\.eqx is missing"):
        open_pretraining(run)


# --- whole searches -----------------------------------------------------------------------------

SMALL = (
    "search.trials=3",
    "search.scheduler=none",
    "training.epochs=4",
    "search.grace=2",
    "resources.workers=1",
)


@pytest.fixture(scope="module")
def simulated(ray_instance: Any, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    folder = tmp_path_factory.mktemp("simulated")
    spec = load_spec(
        "quick",
        [
            *SMALL,
            "space.width={choices: [8, 12]}",
            "space.depth=1",
            "evaluation.finalists=2",
            "evaluation.finalist_folds=2",
            "evaluation.finalist_seeds=2",
            "pretrain={source: simulated, exposures: 200, epochs: 3}",
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("desisky_tune.data.cache.cache_folder", lambda _=None: folder / "cache")
        return run_search(spec, runs=folder / "runs", name="first")


@pytest.fixture(scope="module")
def onward(ray_instance: Any, simulated: SearchResult) -> SearchResult:
    """A search that begins with the winner of the first, and hardly moves."""
    spec = load_spec(
        "quick",
        [
            *SMALL,
            "space={learning_rate: {low: 1e-12, high: 2e-12}}",
            "evaluation.finalists=0",
            f"pretrain={simulated.run_dir}",
        ],
    )
    return run_search(spec, runs=simulated.run_dir.parent, name="onward")


def test_a_search_says_everywhere_what_it_began_with(
    simulated: SearchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    note = json.loads((simulated.run_dir / "search.json").read_text())["pretrain"]
    assert note["source"] == "simulated"
    assert "SV1" in note["constants"]
    assert note["rows"] == len(pd.read_parquet(simulated.run_dir / "pretrained/simulated.parquet"))
    pretrained = simulated.winner.configuration != default_configuration()
    assert ("pretrain" in read_header(simulated.checkpoint)) == pretrained
    assert "SV1" in simulated.evaluation["pretrain"]
    assert main(["leaderboard", str(simulated.run_dir)]) == 0
    assert "pretrained on" in capsys.readouterr().out
    assert facts(load_run(simulated.run_dir))["pretrain"] == simulated.evaluation["pretrain"]


def test_every_member_began_with_pretrained_weights(simulated: SearchResult) -> None:
    for path in RunFolder(simulated.run_dir).trials.glob("*-fold*.eqx"):
        header = read_header(path)
        is_default = header["arch"]["width_size"] == 128
        assert ("pretrain" in header) == (not is_default)


def test_a_trial_of_such_a_run_is_repeated_bit_for_bit(
    simulated: SearchResult, tmp_path: Path
) -> None:
    record = simulated.records[1]
    progress = train_single(repeated_training(simulated.run_dir, 1), tmp_path / "again.eqx")
    assert dict(progress.curve) == record.curve
    assert read_header(tmp_path / "again.eqx")["pretrain"]["source"] == "simulated"


def test_a_search_from_a_run_begins_with_its_winner_s_figures(
    simulated: SearchResult, onward: SearchResult, tmp_path: Path
) -> None:
    """With those of one network: what the first search exports may be the mean of several."""
    run = open_run(onward.run_dir)
    frame = run.table.frame.iloc[run.split.validation]
    given = Predictor.load(run.folder.pretrained / "given.eqx").predict(frame)
    residual = given - frame[list(TARGETS)]
    expected = np.sqrt((residual.to_numpy() ** 2).mean(axis=0))
    # One training of the winner's configuration, as its own final fit begins.
    taken = simulated.evaluation["finalists"][0]["number"]
    winner = next(
        record
        for record in Ledger(RunFolder(simulated.run_dir).finalists).records()
        if record.number == taken
    )
    once = write_final_fit(open_run(simulated.run_dir), fit_of(winner, {}), tmp_path / "1.eqx", 1)
    np.testing.assert_allclose(given, Predictor.load(once).predict(frame), atol=1e-4)
    for record in onward.records[1:]:
        assert record.configuration["width"] == simulated.winner.configuration["width"]
        assert record.configuration["depth"] == simulated.winner.configuration["depth"]
        first = [record.curve[band][0] for band in BANDS]
        np.testing.assert_allclose(first, expected, atol=1e-3)
    note = json.loads((onward.run_dir / "search.json").read_text())["pretrain"]
    assert (note["run"], note["seen"]["test"]) == ("first", 0)
    assert onward.records[0].configuration == default_configuration()


def test_an_interrupted_search_goes_on_without_the_run_that_it_began_with(
    ray_instance: Any, onward: SearchResult, tmp_path: Path
) -> None:
    cut = RunFolder(tmp_path / onward.run_dir.name)
    shutil.copytree(onward.run_dir, cut.path)
    records = Ledger(cut.ledger).records()
    lost = next(record for record in records if record.number == 2)
    kept = [record for record in records if record.number != 2]
    cut.ledger.write_text("".join(f"{record_to_json(record)}\n" for record in kept))
    for path in (cut.evaluation, cut.best, *cut.trials.glob("00002*")):
        path.unlink()
    content = {k: v for k, v in cut.read_search().items() if k not in ("result", "schema")}
    content["spec"]["pretrain"]["source"] = str(tmp_path / "gone")
    cut.write_search(content)

    again = resume_search(cut.path)
    assert again.records[2].curve == lost.curve
    assert [record.objective for record in again.records] == [
        record.objective for record in onward.records
    ]


def test_a_run_without_a_winner_is_no_beginning(table: Any, tmp_path: Path) -> None:
    path = a_checkpoint(tmp_path / "w.eqx")
    run = a_run(tmp_path, spec_for(path), table, make_split(table.frame))
    with pytest.raises(RunError, match=r"no winner yet; finish it with 'desisky-tune resume"):
        load_spec("quick", [f"pretrain={run.folder.path}"])


def test_the_command_ends_with_code_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingFileError):
        load_spec("quick", ["pretrain=nowhere.eqx"])
    assert main(["search", "--runs", str(tmp_path), "--set", "pretrain=nowhere.eqx"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "nowhere.eqx" in err
    path = a_checkpoint(tmp_path / "w.eqx")
    assert main(["search", "--runs", str(tmp_path / "runs"), "--set", f"pretrain={path}"]) == 2
    _, err = capsys.readouterr()
    assert "leave space.width out, or give 12" in err
    assert not (tmp_path / "runs").exists()


def test_desisky_reads_a_checkpoint_that_says_what_it_began_with(simulated: SearchResult) -> None:
    desisky = pytest.importorskip("desisky.io", reason="desisky, of the test extra, is missing")
    path = sorted(RunFolder(simulated.run_dir).pretrained.glob("*.eqx"))[0]
    model, meta = desisky.load_model("broadband", path=path)
    assert meta["pretrain"]["source"] == "simulated"
    ours, _ = load_model("broadband", path=path)
    row = np.array([60.0, 60.0, 45.0, 0.8, 0.95, 0.0], np.float32)
    np.testing.assert_array_equal(model(row), ours(row))
