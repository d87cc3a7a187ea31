"""The report of a run: whole in one file, true to the ledger and to `evaluation.json`."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from headless import Browser, find_browser

import desisky_tune
from desisky_tune.cli import main
from desisky_tune.data import load_features, make_split
from desisky_tune.data.columns import BANDS, TARGETS
from desisky_tune.data.geometry import observing_geometry
from desisky_tune.errors import RunError
from desisky_tune.search import loaded as loaded_module
from desisky_tune.search.backend import Assignment
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.importance import importances
from desisky_tune.search.loaded import LoadedRun, load_run
from desisky_tune.search.local import LocalBackend, SearchArrays
from desisky_tune.search.origin import SearchRun, checkpoint_header, write_run
from desisky_tune.search.records import Ledger, TrialRecord, finish, write_tables
from desisky_tune.search.space import default_configuration, load_spec
from desisky_tune.search.tables import CURVES_SCHEMA, TRIALS_SCHEMA
from desisky_tune.search.winner import crown
from desisky_tune.visualization.contents import occupation
from desisky_tune.visualization.intervals import rmse_intervals
from desisky_tune.visualization.moon_map import moon_map, pointing_altitude
from desisky_tune.visualization.panels import inline_svg

EPOCHS = 12
TRAINED = 2
PRUNED = (2, 3)
FAILED = 4
#: Complete trials whose numbers are made up: more points for the figures of the search.
IMAGINED = range(5, 12)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two trained trials and some made-up ones; a file name needs escaping."""
    runs = tmp_path_factory.mktemp("runs")
    changed = (f"training.epochs={EPOCHS}", "search.grace=3", "search.trials=12")
    spec = load_spec("quick", [*changed, "evaluation.finalists=0"])
    table = load_features("sv1")
    split = make_split(table.frame, "NIGHT", seed=0)
    folder = RunFolder.create(runs, "small", exact=True)
    run = SearchRun(folder, spec, table, split)
    write_run(run)
    arrays = SearchArrays.from_table(table, split.train, split.validation, spec.data.features)
    backend = LocalBackend(arrays, spec.training, folder.trials, checkpoint_header(run))
    ledger = Ledger(folder.ledger)
    for number in range(TRAINED):
        configuration = default_configuration()
        if number > 0:
            configuration |= {"width": 32, "depth": 1 + number, "learning_rate": 0.01}
        assignment = Assignment(number, configuration, seed=0)
        first, last = (backend.advance(assignment, epochs) for epochs in (3, EPOCHS))
        backend.release(assignment)
        ledger.append(ended(number, configuration, last.as_result(), {3: first.objective}))
    draw = np.random.default_rng(0)
    for number in (*PRUNED, FAILED, *IMAGINED):
        configuration = {**default_configuration(), "width": 64, "depth": 1 + number % 5}
        configuration["learning_rate"] = float(10 ** draw.uniform(-4, -2))
        configuration["huber_delta"] = float(10 ** draw.uniform(-2, 0))
        objective = math.nan if number == FAILED else 2.0 + 0.1 * number
        epochs = 3 if number in (*PRUNED, FAILED) else EPOCHS
        ledger.append(ended(number, configuration, made_up(objective, epochs), {3: objective}))
    records = ledger.records()
    write_tables(records, folder.path)
    trained = [record for record in records if record.number < TRAINED]
    winner = min(trained, key=lambda record: record.objective or math.inf)
    crown(run, winner, records)
    return folder.path


def ended(
    number: int, configuration: dict[str, Any], result: dict[str, Any], rungs: dict[int, float]
) -> TrialRecord:
    return finish(
        number=number,
        configuration=configuration,
        result=result,
        max_epochs=EPOCHS,
        started=1.7e9 + number,
        ended=1.7e9 + number + 1,
        rungs=rungs,
        reason="<b>it & broke</b>" if number == FAILED else None,
    )


def made_up(objective: float, epochs: int) -> dict[str, Any]:
    series = np.linspace(objective + 1, objective, epochs).tolist()
    return {
        "objective": objective,
        "rmse": dict.fromkeys(BANDS, objective),
        "best_epoch": epochs - 1,
        "epochs": epochs,
        "seconds": 1.5,
        "curve": dict.fromkeys(("train_loss", "test_loss", *BANDS), series),
    }


@pytest.fixture(scope="module")
def run(run_dir: Path) -> LoadedRun:
    return load_run(run_dir)


@pytest.fixture(scope="module")
def page(run: LoadedRun) -> Path:
    return run.report()


class Page(HTMLParser):
    """Reads a page: whether its elements close, what it refers to, its figures of merit."""

    VOID = frozenset(("meta", "link", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.identifiers: list[str] = []
        self.elements: list[str] = []
        self.figures: dict[str, str] = {}
        self._key: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        known = dict(attrs)
        self._key = known.get("data-figure")
        self.references += [known[key] or "" for key in ("href", "src", "srcset") if key in known]
        if known.get("id"):
            self.identifiers.append(str(known["id"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._key:
            self.figures[self._key] = data.strip()
            self._key = None


@pytest.fixture(scope="module")
def read(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_well_formed(read: Page) -> None:
    assert not read.open
    assert len(set(read.identifiers)) == len(read.identifiers)
    assert {"svg", "table", "figure"} <= set(read.elements)


def test_the_page_refers_to_nothing_outside_its_folder(page: Path, read: Page) -> None:
    text = page.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "iframe", "object", "embed", "img"} & set(read.elements)
    assert not re.search(r"@import|url\((?!#)", text)
    for reference in read.references:
        if reference.startswith("#"):
            assert reference[1:] in read.identifiers
        elif not reference.startswith("data:"):
            assert (page.parent / reference).is_file()
            assert "/" not in reference


def test_every_figure_is_inlined_and_lies_beside_the_page(page: Path, read: Page) -> None:
    drawn = {path.stem for path in page.parent.glob("*.svg")}
    assert drawn == {path.stem for path in page.parent.glob("*.png")}
    assert drawn == {name[4:] for name in read.identifiers if name.startswith("fig-")}
    assert read.elements.count("svg") == read.elements.count("figure") == len(drawn)
    features = {"moonsep", "obsalt", "moonalt", "moonfrac", "transparency-gfa"}
    slices = {"width", "depth", "learning-rate", "huber-delta", "batch-size"}
    assert drawn >= {
        *("comparison", "history", "parallel-coordinates", "importance", "rungs"),
        *("learning-curves", "winner-curves", "residuals-night", "distributions", "colours"),
        *(f"{kind}-{band}" for kind in ("prediction", "moon-map") for band in BANDS),
        *(f"residuals-{name}" for name in features),
        *(f"slice-{name}" for name in slices),
    }
    for path in page.parent.glob("*.svg"):
        ElementTree.parse(path)


def test_figures_of_merit_are_those_of_the_evaluation(run: LoadedRun, read: Page) -> None:
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    expected = {
        f"{model}.{part}.{key}": f"{value:.4f}"
        for model, parts in evaluation["figures"].items()
        for part, values in parts.items()
        for key, value in values.items()
    }
    assert read.figures == expected
    assert set(evaluation["figures"]) - {"trees"} == {"winner", "default", "classical", "constant"}


def test_a_derived_v_is_called_so(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<th>V (derived)<br><small>mag</small></th>" in text
    assert "V is derived from g and r" in text
    assert "Observed V (derived) [AB mag arcsec⁻²]" in text


def test_every_axis_says_what_it_shows(page: Path) -> None:
    texts = {
        path.stem: " ".join(t.text or "" for t in ElementTree.parse(path).iter() if t.text)
        for path in page.parent.glob("*.svg")
    }
    assert "Moon separation [deg]" in texts["residuals-moonsep"]
    assert "Residual [mag]" in texts["residuals-moonsep"]
    assert "Observed z [AB mag arcsec⁻²]" in texts["prediction-z"]
    assert "Predicted r [AB mag arcsec⁻²]" in texts["moon-map-r"]
    assert "winner" in texts["moon-map-r"]
    assert "classical model" in texts["moon-map-r"]
    assert "g - r [mag]" in texts["colours"]
    assert "Validation RMSE [mag]" in texts["history"]
    assert "RMSE [mag]" in texts["comparison"]


def test_text_from_files_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;it &amp; broke&lt;/b&gt;" in text
    assert "<b>it" not in text


def test_cost_and_rungs_count_the_ledger(page: Path) -> None:
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    complete = TRAINED + len(IMAGINED)
    assert f'<td class="text">complete</td><td>{complete}</td>' in text
    assert f'<td class="text">pruned</td><td>{len(PRUNED)}</td><td>6</td><td>3.0</td>' in text
    assert '<td class="text">failed</td><td>1</td><td>3</td>' in text
    assert f"<td>3</td><td>12</td><td>{len(PRUNED)}</td>" in text


def test_missing_eclipses_are_said(page: Path) -> None:
    assert "no eclipsed exposures" in page.read_text(encoding="utf-8")


def test_a_report_reads_no_test_row(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    read_parquet = loaded_module.read_parquet

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = read_parquet(*args, **kwargs)
        seen.update(found["EXPID"].to_pylist())
        return found

    monkeypatch.setattr(loaded_module, "read_parquet", watched)
    without_figures(monkeypatch)
    loaded = load_run(run_dir)
    split = loaded.search["split"]
    loaded.report(tmp_path)
    assert seen == {*split["train"], *split["validation"]}


def test_a_checkpoint_of_another_trial_is_refused(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "small"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("report"))
    winner = json.loads((copy / "evaluation.json").read_text())["winner"]
    other = next(n for n in range(TRAINED) if n != winner)
    shutil.copyfile(copy / "trials" / f"{other:05d}.eqx", copy / "best" / "small.eqx")
    with pytest.raises(RunError, match=r"mag away from its RMSE in evaluation\.json"):
        load_run(copy).report()
    assert not (copy / "report").exists()


def test_a_search_without_an_end_has_no_report(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "small"
    copy.mkdir()
    for name in ("search.json", "features.parquet", "ledger.jsonl"):
        shutil.copyfile(run_dir / name, copy / name)
    unfinished = load_run(copy)
    assert unfinished.evaluation is None
    assert unfinished.checkpoint is None
    assert len(unfinished.trials) == 12
    with pytest.raises(RunError, match="no winner yet"):
        unfinished.report()


def test_the_command_prints_the_page(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    without_figures(monkeypatch)
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or True)
    assert main(["report", str(run_dir), "--out", str(tmp_path / "page"), "--open"]) == 0
    written = tmp_path / "page" / "index.html"
    assert capsys.readouterr().out.strip() == str(written)
    assert opened == [written.as_uri()]
    assert "small" in written.read_text(encoding="utf-8")


def only_figures(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    from desisky_tune.visualization import report

    all_of_them = report._figures

    def chosen(*given: Any) -> Any:
        return (figure for figure in all_of_them(*given) if figure[1] in names)

    monkeypatch.setattr(report, "_figures", chosen)


def test_a_figure_that_does_not_exist_is_said(run: LoadedRun) -> None:
    with pytest.raises(RunError, match=r"figure .histoire.: the report of .* has comparison, hist"):
        run.figures(["histoire"])


def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from desisky_tune.visualization import report

    monkeypatch.setattr(report, "_figures", lambda *given: iter(()))


def test_eclipsed_rows_stand_apart(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "small"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("report"))
    table = pd.read_parquet(copy / "features.parquet")
    chosen = load_run(copy).search["split"]["validation"][:3]
    # A sliver: what the models say changes by less than a report tolerates.
    table.loc[table["EXPID"].isin(chosen), "ECLIPSE_FRAC"] = 5e-4
    table.to_parquet(copy / "features.parquet")
    without_figures(monkeypatch)
    text = load_run(copy).report().read_text(encoding="utf-8")
    assert "3 of the validation rows were taken while a part of the Moon" in text
    for expid in chosen:
        assert f"<td>{expid}</td>" in text
    assert '<td class="text">eclipsed</td><td class="text">winner</td><td>3</td>' in text
    assert '<td class="text">not eclipsed</td><td class="text">classical model</td>' in text


def test_the_way_to_load_the_winner_works_as_shown(
    run: LoadedRun, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("desisky", reason="desisky is the application that loads checkpoints")
    (code, *_) = re.findall(r"<pre><code>(.*?)</code></pre>", page.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(run.path)
    names: dict[str, Any] = {}
    exec(html.unescape(code), names)
    assert all(15 < float(names[band]) < 25 for band in BANDS)


def test_the_documented_page_runs(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "runs" / "quick"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("report"))
    (copy / "best" / "small.eqx").rename(copy / "best" / "quick.eqx")
    only_figures(monkeypatch, "history", "comparison")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "report.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["page"] == copy / "report" / "index.html"
    assert names["page"].is_file()
    assert list(names["figures"]) == ["comparison", "history"]
    assert names["figures"]["history"].axes[0].get_xlabel() == "Trial"
    assert "huber_delta" in capsys.readouterr().out


# --- in a browser ---------------------------------------------------------------------------------


#: The figures that a page links to, each loaded as an image: their widths in pixels.
LINKED_FIGURES = """Promise.all(
  [...document.querySelectorAll('figcaption a')].map(link => new Promise(done => {
    const image = new Image();
    image.onload = image.onerror = () => done([link.getAttribute('href'), image.naturalWidth]);
    image.src = link.href;
  })))"""
#: The images on the page itself, in it or in its drawings, and the drawings: their widths.
SHOWN_FIGURES = """[...document.querySelectorAll('img, svg, svg image')].map(
  each => each.naturalWidth ?? each.getBoundingClientRect().width)"""


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine to look with")
def test_a_browser_shows_the_page_whole(page: Path, tmp_path: Path) -> None:
    figures = {path.name for path in page.parent.iterdir() if path.suffix != ".html"}
    with Browser(tmp_path) as browser:
        for width, scheme in ((390, "light"), (1400, "dark")):
            browser.open(page, width, scheme=scheme)
            assert browser.value_of("document.documentElement.scrollWidth <= window.innerWidth"), (
                f"at {width} px the page is wider than the screen"
            )
            shown = browser.value_of(SHOWN_FIGURES)
            assert len(shown) >= len(figures) / 2
            assert min(shown) > 0
            paper = browser.value_of("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        linked = dict(browser.value_of(LINKED_FIGURES))
        assert set(linked) == figures
        assert min(linked.values()) > 0
        assert browser.complaints == []


# --- load_run -------------------------------------------------------------------------------------


def test_a_run_is_read_back(run: LoadedRun) -> None:
    assert desisky_tune.load_run is load_run
    assert [record.number for record in run.records] == list(range(12))
    assert run.winner is not None
    assert run.evaluation is not None
    assert run.winner.number == run.evaluation["winner"]
    assert run.checkpoint == run.path / "best" / "small.eqx"
    pd.testing.assert_frame_equal(run.trials, pd.read_parquet(run.path / "trials.parquet"))
    pd.testing.assert_frame_equal(run.curves, pd.read_parquet(run.path / "curves.parquet"))
    with pytest.raises(AttributeError):
        run.winner = None  # type: ignore[misc]


def test_rows_are_those_of_the_split(run: LoadedRun) -> None:
    for part in ("train", "validation"):
        frame = run.rows(part)
        assert frame["EXPID"].tolist() == run.search["split"][part]
        assert np.isfinite(frame[list(TARGETS)].to_numpy()).all()
    with pytest.raises(RunError, match="'test'"):
        run.rows("test")


def test_every_column_of_the_tables_is_documented_with_its_type() -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    trials, curves = text.split("### trials.parquet")[1].split("### curves.parquet")
    for section, schema in ((trials, TRIALS_SCHEMA), (curves, CURVES_SCHEMA)):
        lines = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
        documented = [
            (name, kind.strip())
            for _, names, kind, *_ in lines
            for name in re.findall(r"`(\w+)`", names)
        ]
        arrow = {"float64": "double"}
        assert [(name, arrow.get(kind, kind)) for name, kind in documented] == [
            (field.name, str(field.type)) for field in schema
        ]


# --- what the figures are made of -----------------------------------------------------------------


def test_a_hyperparameter_that_decides_everything_is_the_important_one(run: LoadedRun) -> None:
    draw = np.random.default_rng(1)
    records = []
    for number in range(40):
        configuration = {
            "width": int(draw.choice([32, 64])),
            "depth": int(draw.integers(1, 6)),
            "learning_rate": float(10 ** draw.uniform(-4, -1.6)),
            "huber_delta": float(10 ** draw.uniform(-2, 0)),
            "batch_size": 32,
        }
        objective = abs(math.log10(configuration["learning_rate"] / 1e-3)) + 0.1
        records.append(ended(100 + number, configuration, made_up(objective, EPOCHS), {}))
    found = importances(run.spec, records)
    assert found[0].name == "learning_rate"
    assert found[0].value > 0.5
    assert sum(each.value for each in found) == pytest.approx(1)
    assert all(0 <= each.low <= each.high <= 1 for each in found)
    assert importances(run.spec, records[:3]) == []


def test_intervals_hold_the_figures_that_they_belong_to(run: LoadedRun, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, parts in (run.evaluation or {})["figures"].items():
        for key, value in parts["validation"].items():
            cell = re.search(
                rf'data-figure="{name}.validation.{key}">[^<]*<br><small>([\d.]+) to ([\d.]+)<',
                text,
            )
            assert cell is not None, (name, key)
            assert float(cell[1]) < value < float(cell[2])
    # The leaderboard has one for each trial whose weights are there.
    board = text.split('id="leaderboard"')[1].split("<details>")[0]
    assert len(re.findall(r"<td>[\d.]+ to [\d.]+</td>", board)) == TRAINED


def test_residuals_of_one_size_have_no_width_of_interval() -> None:
    observed = np.arange(24.0).reshape(6, 4)
    predicted = observed + np.array([0.1, -0.2, 0.3, 0.4])
    ends = rmse_intervals(predicted, observed, np.array([1, 1, 2, 2, 3, 3]))
    expected = {"V": 0.1, "g": 0.2, "r": 0.3, "z": 0.4, "mean": 0.25, "mean_grz": 0.3}
    assert ends.keys() == expected.keys()
    for key, value in expected.items():
        assert ends[key] == pytest.approx((value, value))


def test_device_time_is_that_in_which_trials_were_under_way() -> None:
    def between(started: float, ended_: float) -> TrialRecord:
        record = ended(0, default_configuration(), made_up(1.0, EPOCHS), {})
        return dataclasses.replace(record, started=started, ended=ended_)

    # Two at a time from 0 to 10, a pause, one from 100 to 105 that follows another at 103.
    records = [between(0, 10), between(2, 8), between(100, 103), between(103, 105)]
    assert occupation(records) == (2, 15.0)
    assert occupation([]) == (0, 0.0)


def test_pointings_around_the_moon_are_where_the_geometry_puts_them() -> None:
    # Towards the zenith the altitude rises by the separation, away from it it falls.
    assert pointing_altitude(40.0, np.array([30.0]), np.array([0.0])) == pytest.approx([70.0])
    assert pointing_altitude(40.0, np.array([30.0]), np.array([180.0])) == pytest.approx([10.0])
    # Beyond the zenith it falls again.
    assert pointing_altitude(60.0, np.array([50.0]), np.array([0.0])) == pytest.approx([70.0])
    # And any pointing of a real night lies between these two.
    sky = observing_geometry(np.full(20, 59300.2), np.linspace(100, 200, 20), np.full(20, 30.0))
    low = pointing_altitude(sky["MOONALT"][0], sky["MOONSEP"], np.full(20, 180.0))
    high = pointing_altitude(sky["MOONALT"][0], sky["MOONSEP"], np.zeros(20))
    assert (sky["OBSALT"] >= low - 1e-6).all()
    assert (sky["OBSALT"] <= high + 1e-6).all()


def test_the_map_stays_inside_the_sampled_range(run: LoadedRun) -> None:
    train = run.rows("train")
    asked: list[pd.DataFrame] = []

    def predict(frame: pd.DataFrame) -> np.ndarray:
        asked.append(frame)
        return np.tile(frame["OBSALT"].to_numpy()[:, None], (1, 4))

    drawn = moon_map(train, predict)
    assert drawn.separation.min() >= max(31.0, train["MOONSEP"].min())
    assert drawn.separation.max() <= min(90.0, train["MOONSEP"].max())
    shown = drawn.magnitudes[np.isfinite(drawn.magnitudes)]
    assert shown.min() > 31.0
    assert shown.max() <= train["OBSALT"].max()
    # The model knows no azimuth: left mirrors right.
    np.testing.assert_allclose(drawn.magnitudes, drawn.magnitudes[:, ::-1], atol=1e-9)
    assert (asked[0]["MOONALT"] == train["MOONALT"].median()).all()
    assert (asked[0]["ECLIPSE_FRAC"] == 0).all()


def test_an_inlined_svg_takes_the_pages_colours_and_keeps_its_references() -> None:
    svg = (
        '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt">'
        '<defs><path id="m1" style="fill: #ffffff; stroke: #111111"/></defs>'
        '<use xlink:href="#m1" clip-path="url(#c)" style="fill: #123456"/></svg>'
    )
    assert inline_svg(svg, "a") == (
        '<svg><defs><path id="a-m1" style="fill: var(--paper); stroke: var(--ink)"/></defs>'
        '<use href="#a-m1" clip-path="url(#a-c)" style="fill: #123456"/></svg>'
    )
