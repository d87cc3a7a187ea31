"""Space files: what they may say, what is refused and in which words."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import SpaceError
from desisky_tune.search.hyperparameters import DOCUMENTED, HYPERPARAMETERS, OPTIONAL
from desisky_tune.search.parameters import Choices, Conditional, Fixed, Range
from desisky_tune.search.reading import read_parameter
from desisky_tune.search.space import (
    PretrainSpec,
    SearchSpec,
    default_configuration,
    load_spec,
    resolved_dict,
    rungs,
    spec_from_dict,
)
from desisky_tune.search.space_file import find_space, space_names, spaces_folder


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        load_spec(path, overrides)
    return str(caught.value).splitlines()


# --- the files that come with the package


def test_the_files_that_come_with_the_package_are_known_by_name() -> None:
    assert space_names() == ["broadband", "quick"]
    for name in space_names():
        spec = load_spec(name)
        assert spec.name == name
        assert spec.data.features == FEATURES


def test_broadband_is_the_space_of_the_whole_model() -> None:
    spec = load_spec("broadband")
    assert spec.space["width"] == Range(16, 512, log=True, step=1, whole=True)
    assert spec.space["depth"] == Range(1, 8, step=1, whole=True)
    assert spec.space["learning_rate"] == Range(1e-5, 1e-1, log=True)
    assert spec.space["huber_delta"] == Range(0.01, 2, log=True)
    assert isinstance(spec.space["batch_size"], Choices)
    assert spec.training.epochs == 500


def test_every_line_of_the_files_that_sets_something_is_commented() -> None:
    sections = {"data:", "split:", "space:", "training:", "search:", "evaluation:", "resources:"}
    for path in spaces_folder().glob("*.yaml"):
        for line in path.read_text().splitlines():
            if line.strip() and line not in sections:
                assert "#" in line, f"{path.name}: {line}"


def test_readme_lists_every_field_with_its_default() -> None:
    text = (spaces_folder() / "README.md").read_text()
    table = text.partition("## Fields")[2]
    listed = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", table, flags=re.M))
    empty = resolved_dict(spec_from_dict({}))
    # Without a source there is no such section.
    empty["pretrain"] = PretrainSpec(source="simulated").model_dump() | {"source": None}
    empty["space"] |= {name: HYPERPARAMETERS[name].default for name in OPTIONAL}
    fields = {"name"}
    for section, values in empty.items():
        if isinstance(values, dict):
            fields |= {f"{section}.{key}" for key in values}
    assert set(listed) == fields
    for field in fields - {"name", "data.features"}:
        section, _, key = field.partition(".")
        default = empty[section][key]
        told = listed[field].strip("`")
        if default is None:
            assert told in ("none", "auto")
        elif isinstance(default, float | int) and not isinstance(default, bool):
            assert float(told) == default, field
        else:
            assert told == (default if isinstance(default, str) else json.dumps(default)), field


# --- reading


def test_everything_can_be_left_out(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, "training:\nsearch:\n  trials: 3\n"))
    assert spec.name == "mine"
    assert spec.search.trials == 3
    assert spec.fixed_configuration() == default_configuration(spec)
    assert spec.distributions() == {}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "1.0e-4", "10e-5", "+1e-4"])
def test_a_small_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, f"space:\n  learning_rate: {text}\n")
    assert load_spec(path).space["learning_rate"] == Fixed(1e-4)
    override = f"space.learning_rate={text}"
    assert load_spec("quick", [override]).space["learning_rate"] == Fixed(1e-4)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("'90s'", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("0.5", 0.5)],
)
def test_time_limits(text: str, seconds: float) -> None:
    assert load_spec("quick", [f"search.time_limit={text}"]).search.time_limit == seconds


def test_whole_numbers_may_be_written_as_powers_of_ten() -> None:
    spec = load_spec("quick", ["search.trials=1e3", "space.width={low: 1e1, high: 1e2}"])
    assert spec.search.trials == 1000
    assert spec.space["width"] == Range(10, 100, step=1, whole=True)
    assert isinstance(spec.space["width"].low, int)


def test_overrides_change_one_field_and_the_last_counts() -> None:
    overrides = ["space.depth.high=4", "search.trials=6", "search.trials=7", "data.source=a=b.csv"]
    spec = load_spec("quick", overrides)
    assert spec.space["depth"] == Range(1, 4, step=1, whole=True)
    assert spec.search.trials == 7
    assert spec.data.source == "a=b.csv"
    assert load_spec("quick", ["resources.workers=auto"]).resources.workers is None
    assert load_spec("quick", ["resources.gpus_per_trial=0.25"]).resources.gpus_per_trial == 0.25


def test_a_specification_survives_json_and_pickle() -> None:
    for name in space_names():
        spec = load_spec(name, ["search.time_limit=1h", "resources.workers=3"])
        content = json.loads(json.dumps(resolved_dict(spec)))
        assert spec_from_dict(content) == spec
        assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_specification_does_not_change() -> None:
    spec = load_spec("quick")
    with pytest.raises(ValueError, match="frozen"):
        spec.search.trials = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("epochs", "grace", "reduction", "expected"),
    [
        (400, 25, 3, [25, 75, 225, 400]),
        (243, 1, 3, [1, 3, 9, 27, 81, 243]),
        (540, 20, 3, [20, 60, 180, 540]),
        (9, 3, 3, [3, 9]),
        (5, 50, 3, [5]),
        (50, 50, 2, [50]),
    ],
)
def test_rungs(epochs: int, grace: int, reduction: int, expected: list[int]) -> None:
    options = {"grace": grace, "reduction": reduction}
    spec = spec_from_dict({"training": {"epochs": epochs}, "search": options})
    assert rungs(spec) == expected


def test_the_default_is_the_documented_one() -> None:
    expected = {
        "width": 128,
        "depth": 5,
        "learning_rate": 1e-4,
        "huber_delta": 0.25,
        "batch_size": 32,
    }
    assert default_configuration(load_spec("quick")) == expected


# --- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trails=6", "search.trails: unknown key; did you mean 'trials'?"),
        ("serch.trials=6", "serch: unknown key; did you mean 'search'?"),
        ("space.widht=6", "space.widht: unknown key; did you mean 'width'?"),
        ("space.width.hihg=6", "space.width.hihg: unknown key; did you mean 'high'?"),
        ("search.trials.x=6", "search.trials has no fields of its own"),
        ("search.trials", "must be FIELD=VALUE"),
        ("=6", "must be FIELD=VALUE"),
        ("search.trials=[1", "not valid YAML"),
        ("search.trials=0", "search.trials = 0: must be at least 1"),
        ("search.trials=many", "search.trials = 'many': must be a whole number"),
        ("search.trials=true", "search.trials = True: must be a whole number"),
        ("search.trials=2.5", "search.trials = 2.5: must be a whole number"),
        ("search.trials='6'", "search.trials = '6': must be a whole number"),
        ("search.trials=", "search.trials = None: must be a whole number"),
        ("search.seed=-1", "search.seed = -1: must be at least 0"),
        ("search.sampler=tpa", "search.sampler = 'tpa': must be one of 'tpe', 'gp', 'cmaes'"),
        ("search.reduction=1", "search.reduction = 1: must be at least 2"),
        ("search.time_limit=soon", "search.time_limit = 'soon': must be seconds, or a time"),
        ("search.time_limit=0", "search.time_limit = 0: must be above 0"),
        ("search.default_first=1", "search.default_first = 1: must be true or false"),
        ("data.subset=day", "data.subset = 'day': must be one of 'moon', 'dark', 'twilight'"),
        ("data.source=", "data.source = None: must be text"),
        ("data.source=''", "data.source = '': must not be empty"),
        ("data.features=[]", "data.features = []: must name at least one column, each once"),
        ("data.features=[A, A]", "data.features = ['A', 'A']: must name at least one column"),
        ("data.features=A", "data.features = 'A': must be a list"),
        ("split.fractions=[0.6, 0.4]", "split.fractions[2]"),
        ("split.fractions=[0.6, 0.6, 0.2]", "three shares above 0"),
        ("split.fractions=[0.8, 0.2, 0]", "three shares above 0"),
        ("split.fractions=[0.6, x, 0.2]", "split.fractions[1] = 'x': must be a number"),
        ("training.loss=l1", "training.loss = 'l1': must be one of 'huber' or 'l2'"),
        ("training.loss=l2", "training.loss is l2, which has no delta"),
        ("resources.gpus_per_trial=1.5", "must be a fraction up to 1, or a whole number"),
        ("resources.cpus_per_trial=0", "resources.cpus_per_trial = 0: must be above 0"),
        ("resources.workers=0", "resources.workers = 0: must be at least 1"),
        ("name=../elsewhere", "allowed are letters, digits"),
        ("search=6", "search = 6: must be a section"),
        ("space=6", "space = 6: must name hyperparameters"),
        ("search.objectives=[parameters]", "must be [rmse] or [rmse, parameters]"),
        ("search.objectives=[loss]", "search.objectives[0] = 'loss': must be one of 'rmse'"),
        ("search.max_parameters=0", "search.max_parameters = 0: must be at least 1"),
        ("search.constraints=[width]", "search.constraints[0] = 'width': must compare width,"),
        ("search.constraints=['widht < 3']", "'widht' is not known here; must compare width"),
        ("search.constraints=width < 3", "search.constraints = 'width < 3': must be a list"),
        ("search.warm_start=[{widht: 3}]", "search.warm_start[0].widht = 3: unknown key; did"),
        ("search.warm_start=[{width: 0}]", "search.warm_start[0].width = 0: must be a whole"),
        ("search.warm_start=[3]", "search.warm_start[0]"),
        ("space.depth={low: 1, high: 3, when: 3}", "space.depth.when = 3: must be a condition"),
        ("space.depth={low: 1, high: 3, otherwise: 2}", "space.depth.when = None: must be a cond"),
        ("space.width={low: 1, high: 3, when: 'depth > 1'}", "width comes first, and depends on"),
        ("space.depth={low: 1, high: 3, when: 'batch_size > 1'}", "'batch_size' is not known here"),
        ("space.depth={low: 1, high: 3, when: 'width > 1', otherwise: 0}", "depth.otherwise = 0"),
        ("space.width=0", "space.width = 0: must be a whole number from 1 to 8192"),
        ("space.width=64.5", "space.width = 64.5: must be a whole number"),
        ("space.width=true", "space.width = True: must be a whole number"),
        ("space.width=[64, 128]", "a list of values is written {choices: [64, 128]}"),
        ("space.width={low: 64}", "needs low and high; high is missing"),
        ("space.width={low: 64, high: 64}", "space.width.low = 64: must be below high (64)"),
        ("space.width={low: 9, high: 8}", "space.width.low = 9: must be below high (8)"),
        ("space.width={low: 1, high: 9000}", "space.width.high = 9000: must be a whole number"),
        ("space.width={low: 1, high: 9, log: 1}", "space.width.log = 1: must be true or false"),
        ("space.width={low: 1, high: 9, step: 9}", "must be above 0 and at most high - low (8)"),
        ("space.width={low: 1, high: 9, step: 0}", "must be above 0"),
        ("space.width={low: 1, high: 9, step: 0.5}", "must be a whole number above 0"),
        ("space.width={low: 1, high: 9, log: true, step: 2}", "cannot be combined with log"),
        ("space.width={choices: []}", "space.width.choices = []: must list at least one value"),
        ("space.width={choices: [1, 1]}", "must name each value once"),
        ("space.width={choices: [1, x]}", "space.width.choices[1] = 'x': must be a whole number"),
        ("space.width={choices: [1], low: 1}", "choices stand alone"),
        ("space.learning_rate=0", "must be a number above 0 to 10"),
        ("space.learning_rate=.nan", "must be a number above 0 to 10"),
        ("space.learning_rate={low: 0, high: 1, log: true}", "must be above 0 on a log scale"),
        ("space.learning_rate={low: -1, high: 1, log: true}", "must be above 0 on a log scale"),
        ("space.schedule=linear", "space.schedule = 'linear': must be constant or cosine"),
        ("space.schedule=1", "space.schedule = 1: must be constant or cosine"),
        ("space.schedule={low: 0, high: 1}", "must be constant or cosine, or {choices: [constant"),
        ("space.schedule={choices: [cosine, step]}", "space.schedule.choices[1] = 'step': must be"),
        ("space.warmup=1", "space.warmup = 1: must be a number from 0 to below 1"),
        ("space.warmup={low: 0, high: 1}", "space.warmup.high = 1: must be a number from 0 to b"),
        ("space.final_rate=1.1", "space.final_rate = 1.1: must be a number from 0 to 1"),
        ("space.weight_decay=-0.1", "space.weight_decay = -0.1: must be a number from 0 to 100"),
        ("space.gradient_clip=-1", "space.gradient_clip = -1: must be a number from 0 to 1e+06"),
        ("space.early_stopping=2.5", "space.early_stopping = 2.5: must be a whole number from 0"),
        ("space.warmup={low: 0, high: .1, when: 'schedule > 1'}", "must compare width,"),
        ("space.warmup={low: 0, high: .1, when: 'schedule == 1'}", "must compare width,"),
        ("space.warmup={low: 0, high: .1, when: 'depth == cosine'}", "'cosine' is not known here"),
        ("search.constraints=['schedule + 1 > 2']", "must compare width,"),
        ("search.warm_start=[{weight_decay: -1}]", "search.warm_start[0].weight_decay = -1: must"),
    ],
)
def test_overrides_that_break_a_rule(override: str, message: str) -> None:
    lines = problems("quick", override)
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith(f"--set {override}") or "space.huber_delta" in lines[0]


def test_every_problem_of_a_file_has_its_own_line(tmp_path: Path) -> None:
    text = """
space:
  width: {low: 512, high: 16}
  deepth: 3
  learning_rate: {low: 0, high: 1, log: true}
  batch_size: {choices: []}
search: {sampler: magic, trials: 0, color: red}
surprise: 1
"""
    path = written(tmp_path, text)
    expected = [
        "space.deepth = 3: unknown key; did you mean 'depth'?",
        "space.width.low = 512: must be below high (16)",
        "space.learning_rate.low = 0: must be above 0 on a log scale",
        "space.batch_size.choices = []: must list at least one value",
        "search.trials = 0: must be at least 1",
        "search.sampler = 'magic': must be one of",
        "search.color = 'red': unknown key",
        "surprise = 1: unknown key",
    ]
    lines = problems(path)
    assert len(lines) == len(expected)
    for start in expected:
        assert any(line.startswith(f"{path}: {start}") for line in lines), start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space:\n  width: 3\n  width: 4\n", ", line 3: key 'width' stands twice"),
        ("search:\n  trials: 3\nsearch:\n  seed: 1\n", ", line 3: key 'search' stands twice"),
        ("search:\n  trials: [1,\n", "not valid YAML"),
        ("search:\n\ttrials: 3\n", ", line 2: not valid YAML"),
        ("{1: 2}", ", line 1: key 1 must be text"),
        ("", "must hold sections"),
        ("[1, 2]", "must hold sections"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: &a [*a, *a]", "unknown key"),
    ],
)
def test_files_that_are_not_a_space(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    [line] = problems(path)
    assert line.startswith(str(path))
    assert message in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    [line] = problems("quik")
    assert "did you mean 'quick'?" in line
    [line] = problems(str(tmp_path / "nothing.yaml"))
    assert "no space file" in line
    [line] = problems(str(tmp_path))
    assert "is a folder" in line
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    [line] = problems(binary)
    assert "not UTF-8" in line
    large = tmp_path / "large.yaml"
    large.write_text("# much\n" * 200_000)
    [line] = problems(large)
    assert "too large" in line


def test_a_range_cannot_be_made_of_a_list_by_setting_one_end(tmp_path: Path) -> None:
    path = written(tmp_path, "space:\n  depth: 5\n")
    [line] = problems(path, "space.depth.high=4")
    assert "space.depth is 5 here, which has no 'high'; set it whole" in line
    [line] = problems("quick", "space.width.high=4")
    assert "choices stand alone" in line


def test_a_saved_specification_that_was_changed_is_refused_with_its_file() -> None:
    content = resolved_dict(load_spec("quick"))
    content["search"]["sampler"] = "magic"
    with pytest.raises(SpaceError, match=r"^run/search.json: search.sampler = 'magic'"):
        spec_from_dict(content, where="run/search.json")


def test_a_path_goes_before_nothing_and_after_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    assert find_space("quick").parent == spaces_folder()
    path = written(tmp_path, "search: {trials: 2}\n")
    assert find_space("mine.yaml").resolve() == path


# --- optional hyperparameters


def test_optional_hyperparameters_stand_where_the_space_names_them() -> None:
    space = {
        "schedule": {"choices": ["constant", "cosine"]},
        "warmup": {"low": 0, "high": 0.2, "when": "schedule == 'cosine'"},
        "weight_decay": {"low": 1e-4, "high": 1e-1, "log": True},
        "early_stopping": 50,
    }
    spec = spec_from_dict({"space": space})
    assert list(spec.space) == [*DOCUMENTED, *space]
    assert spec_from_dict(json.loads(json.dumps(resolved_dict(spec)))) == spec
    off = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "early_stopping": 0}
    assert default_configuration(spec) == {**default_configuration(), **off}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(20):
        configuration = spec.suggest(study.ask())
        assert list(configuration) == list(spec.space)
        assert configuration["early_stopping"] == 50
        assert configuration["schedule"] == "cosine" or configuration["warmup"] == 0
        seen.add((configuration["schedule"], configuration["warmup"] > 0))
    assert seen == {("constant", False), ("cosine", True)}


def test_what_is_off_has_no_place_in_a_logarithmic_range() -> None:
    space = {"weight_decay": {"low": 1e-4, "high": 1e-1, "log": True}}
    spec = spec_from_dict({"space": space})
    assert spec.as_params(default_configuration(spec)) == ({}, {})
    # A configuration of an earlier run does not name it at all.
    assert spec.as_params(default_configuration()) == ({}, {})


def test_words_have_their_place_on_the_unit_interval() -> None:
    choices = Choices(("cosine", "constant"))
    assert [choices.at(fraction) for fraction in (0, 0.4, 0.6, 1)] == [
        "cosine", "cosine", "constant", "constant"
    ]  # fmt: skip
    assert [choices.fraction(word) for word in choices.choices] == [0.25, 0.75]
    assert choices.widened("constant") is not None
    assert Choices(("cosine",)).widened("constant") is None


def test_a_constraint_may_speak_of_words_and_of_what_is_off() -> None:
    texts = ["schedule == 'cosine' or weight_decay == 0"]
    spec = spec_from_dict({"search": {"constraints": texts}})
    assert spec.broken_constraint(default_configuration()) is None
    decayed = {**default_configuration(), "weight_decay": 0.1}
    assert spec.broken_constraint(decayed) == f"search.constraints[0] {texts[0]!r}"
    assert spec.broken_constraint({**decayed, "schedule": "cosine"}) is None


# --- suggestions and the unit interval


def test_suggestions_come_from_the_space_in_the_right_types() -> None:
    spec = load_spec("broadband", ["space.huber_delta=0.3"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        trial = study.ask()
        configuration = spec.suggest(trial)
        assert list(configuration) == list(DOCUMENTED)
        assert configuration["huber_delta"] == 0.3
        assert 16 <= configuration["width"] <= 512
        assert isinstance(configuration["width"], int)
        assert isinstance(configuration["learning_rate"], float)
        assert trial.params.keys() == spec.distributions().keys()
        assert trial.distributions == spec.distributions()
        assert spec.as_params(configuration) == (trial.params, trial.distributions)


def test_params_hold_a_configuration_beyond_the_space() -> None:
    space = {
        "width": {"low": 200, "high": 500, "step": 100},
        "depth": {"low": 1, "high": 3},
        "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        "batch_size": {"choices": [64, 128]},
    }
    spec = spec_from_dict({"space": space})
    configuration = default_configuration(spec)
    params, distributions = spec.as_params(configuration)
    assert params == {"width": 128, "depth": 5, "learning_rate": 1e-4}
    for name, value in params.items():
        assert distributions[name].low <= value <= distributions[name].high
    # Optuna's own check: a trial with these can be made.
    optuna.create_trial(params=params, distributions=distributions, value=1.0)


ranges = st.one_of(
    st.tuples(st.integers(1, 50), st.integers(1, 200), st.booleans()).map(
        lambda t: read_parameter("width", {"low": t[0], "high": t[0] + t[1], "log": t[2]})[0]
    ),
    st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(1, 9)).map(
        lambda t: read_parameter("width", {"low": t[0], "high": t[0] + t[1] + t[2], "step": t[1]})[
            0
        ]
    ),
    st.tuples(st.floats(1e-6, 1), st.floats(1.1, 10), st.booleans()).map(
        lambda t: read_parameter("learning_rate", {"low": t[0], "high": t[1], "log": t[2]})[0]
    ),
    st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True).map(
        lambda values: read_parameter("width", {"choices": values})[0]
    ),
)


@settings(max_examples=60, deadline=None)
@given(parameter=ranges, fraction=st.floats(0, 1))
def test_every_point_of_the_unit_interval_is_a_value_of_the_space(
    parameter: Any, fraction: float
) -> None:
    value = parameter.at(fraction)
    assert parameter.contains(value)
    assert parameter.distribution._contains(parameter.distribution.to_internal_repr(value))
    back = parameter.at(parameter.fraction(value))
    assert back == (value if isinstance(value, int) else pytest.approx(value, rel=1e-9))


@settings(max_examples=30, deadline=None)
@given(parameter=ranges)
def test_the_ends_of_the_unit_interval_are_the_ends_of_the_space(parameter: Any) -> None:
    low, high = parameter.at(0.0), parameter.at(1.0)
    if isinstance(parameter, Choices):
        assert (low, high) == (min(parameter.choices), max(parameter.choices))
    else:
        assert low == pytest.approx(parameter.low)
        assert high == pytest.approx(parameter.top)


def test_log_ranges_are_even_in_factors() -> None:
    rate = Range(1e-5, 1e-1, log=True)
    assert rate.at(0.5) == pytest.approx(1e-3)
    assert rate.at(0.25) == pytest.approx(1e-4)
    assert Range(0, 8).at(0.25) == 2


def test_steps_end_at_the_last_that_fits() -> None:
    parameter, _ = read_parameter("huber_delta", {"low": 0.1, "high": 0.45, "step": 0.1})
    assert isinstance(parameter, Range)
    assert parameter.top == 0.4
    assert [parameter.at(f) for f in (0.1, 0.3, 0.6, 0.9)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert parameter.contains(0.30000000000000004)
    assert not parameter.contains(0.25)


# --- constraints, conditions, what to begin with


def test_a_constraint_speaks_of_hyperparameters_and_weights() -> None:
    options = {"constraints": ["width * depth <= 1024", "parameters < 20_000 or depth == 1"]}
    spec = spec_from_dict({"search": {**options, "max_parameters": 100_000}})
    small = {**default_configuration(), "width": 64, "depth": 3}
    assert spec.broken_constraint(small) is None
    # 6 x 128 + 128, 4 x (128 x 128 + 128), 128 x 4 + 4
    assert spec.broken_constraint(default_configuration()) == (
        "search.constraints[1] 'parameters < 20_000 or depth == 1'"
    )
    assert not spec.default_runs
    assert spec.broken_constraint({**small, "width": 512}) == (
        "search.max_parameters 100,000 (it has 530,948)"
    )
    assert spec.broken_constraint({**small, "width": 1100, "depth": 1}) == (
        "search.constraints[0] 'width * depth <= 1024'"
    )


def test_two_objectives_are_not_for_everyone() -> None:
    both = "search.objectives=[rmse, parameters]"
    lines = problems("quick", both, "search.sampler=gp")
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "search.sampler = 'gp'",
        "search.scheduler = 'asha'",
    ]
    assert all(
        "with objectives [rmse, parameters]" in line or "tpe, random" in line for line in lines
    )
    assert load_spec("quick", [both, "search.scheduler=none"]).search.sampler == "tpe"


def test_a_warm_start_must_keep_the_constraints() -> None:
    options = ["search.max_parameters=1000", "search.warm_start=[{width: 8, depth: 1}, {}]"]
    [line] = problems("quick", *options)
    assert "search.warm_start[1]" in line
    assert "breaks search.max_parameters 1,000 (it has 67,460)" in line


def test_a_conditional_hyperparameter_is_searched_where_its_condition_holds() -> None:
    override = "space.batch_size={choices: [16, 64], when: 'width >= 128 and depth > 1'}"
    spec = load_spec("quick", [override])
    parameter = spec.space["batch_size"]
    assert isinstance(parameter, Conditional)
    assert parameter.otherwise == 32
    assert "batch_size" not in spec.unconditional()
    assert spec_from_dict(json.loads(json.dumps(resolved_dict(spec)))) == spec
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        trial = study.ask()
        configuration = spec.suggest(trial)
        holds = configuration["width"] >= 128 and configuration["depth"] > 1
        assert ("batch_size" in trial.params) == holds
        assert configuration["batch_size"] in ((16, 64) if holds else (32,))
        assert spec.as_params(configuration)[0] == trial.params
        seen.add(configuration["batch_size"])
    assert seen == {16, 32, 64}


def test_parts_of_a_specification_can_be_made_in_python() -> None:
    spec = SearchSpec(space={"width": {"choices": (32, 64)}})
    assert spec.space["width"] == Choices((32, 64))
    assert math.isclose(sum(spec.split.fractions), 1)
