"""Bad input: one line on standard error, exit code 2, nothing half-written.

Each case is a function that prepares files in a folder and returns the arguments of the
command; beside it stand pieces of the message that a person needs.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from builders import catalogue_metadata, marked_flux, write_catalogue

from desisky_tune.cli import main
from desisky_tune.data import vac
from desisky_tune.data.columns import FEATURES

Case = Callable[[Path], list[str]]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sv1_table() -> pd.DataFrame:
    from desisky_tune.data.features import source_path

    return pd.read_csv(source_path("sv1"))


def csv(folder: Path, frame: pd.DataFrame, name: str = "table.csv") -> str:
    path = folder / name
    frame.to_csv(path, index=False)
    return str(path)


def ingest(source: str, folder: Path, *options: str) -> list[str]:
    return ["data", "ingest", source, str(folder / "out.parquet"), *options]


# ---------------------------------------------------------------- tables and catalogues


def missing_table(folder: Path) -> list[str]:
    return ingest(str(folder / "nothing.csv"), folder)


def a_folder_for_a_file(folder: Path) -> list[str]:
    (folder / "table.csv").mkdir()
    return ingest(str(folder / "table.csv"), folder)


def empty_file(folder: Path) -> list[str]:
    (folder / "table.csv").touch()
    return ingest(str(folder / "table.csv"), folder)


def unknown_kind_of_table(folder: Path) -> list[str]:
    (folder / "table.xlsx").write_bytes(b"PK\x03\x04")
    return ingest(str(folder / "table.xlsx"), folder)


def truncated_fits(folder: Path) -> list[str]:
    path = write_catalogue(folder / "vac.fits", catalogue_metadata())
    path.write_bytes(path.read_bytes()[:-20_000])
    return ingest(str(path), folder)


def no_fits_at_all(folder: Path) -> list[str]:
    (folder / "vac.fits").write_bytes(b"no FITS file" * 1000)
    return ingest(str(folder / "vac.fits"), folder)


def missing_hdu(folder: Path) -> list[str]:
    path = write_catalogue(folder / "vac.fits", catalogue_metadata(), omit=("METADATA",))
    return ingest(str(path), folder)


def misnamed_column_of_a_catalogue(folder: Path) -> list[str]:
    frame = catalogue_metadata().rename(columns={"TRANSPARENCY_GFA": "TRANSPARENCY_GFI"})
    return ingest(str(write_catalogue(folder / "vac.fits", frame)), folder)


def misnamed_column_of_a_table(folder: Path) -> list[str]:
    frame = sv1_table().rename(columns={"TRANSPARENCY_GFA": "TRANSPARENCY_GFI"})
    return ingest(csv(folder, frame), folder)


def rows_that_disagree(folder: Path) -> list[str]:
    frame = catalogue_metadata(60)
    path = write_catalogue(folder / "vac.fits", frame, marked_flux(frame)[:50])
    return ingest(str(path), folder)


def cut_that_leaves_nothing(folder: Path) -> list[str]:
    return ingest(csv(folder, sv1_table().assign(MOONALT=-40.0)), folder)


def unknown_subset(folder: Path) -> list[str]:
    return ingest("sv1", folder, "--subset", "moonlit")


def no_magnitude_within_reason(folder: Path) -> list[str]:
    return ingest(csv(folder, sv1_table().assign(SKY_MAG_Z_SPEC=28.2)), folder)


def words_for_numbers(folder: Path) -> list[str]:
    frame = sv1_table().astype({"MOONALT": object})
    frame.loc[3, "MOONALT"] = "high"
    return ingest(csv(folder, frame), folder)


def fewer_nights_than_a_split_needs(folder: Path) -> list[str]:
    frame = sv1_table()
    nights = frame.loc[frame["MOONALT"] > 5, "NIGHT"].unique()[:2]
    source = csv(folder, frame[frame["NIGHT"].isin(nights)])
    return ["train", "--data", source, "--subset", "all", "--out", str(folder / "out.eqx")]


def fewer_nights_than_a_search_needs(folder: Path) -> list[str]:
    source = fewer_nights_than_a_split_needs(folder)[2]
    return ["search", "--data", source, "--subset", "all", "--runs", str(folder / "runs")]


def split_by_a_column_that_is_not_there(folder: Path) -> list[str]:
    return ["train", "--split", "NIGTH", "--out", str(folder / "out.eqx")]


def unwritable_kind_of_output(folder: Path) -> list[str]:
    return ["data", "ingest", "sv1", str(folder / "out.xlsx")]


def too_few_simulated_exposures(folder: Path) -> list[str]:
    return ["data", "simulate", "--exposures", "1", str(folder / "out.fits")]


TABLES: dict[Case, tuple[str, ...]] = {
    missing_table: ("nothing.csv", "no such file"),
    a_folder_for_a_file: ("table.csv", "folder"),
    empty_file: ("table.csv", "empty"),
    unknown_kind_of_table: ("table.xlsx", ".csv"),
    truncated_fits: ("vac.fits", "truncated"),
    no_fits_at_all: ("vac.fits", "FITS"),
    missing_hdu: ("vac.fits", "METADATA"),
    misnamed_column_of_a_catalogue: ("vac.fits", "TRANSPARENCY_GFA", "TRANSPARENCY_GFI"),
    misnamed_column_of_a_table: ("table.csv", "TRANSPARENCY_GFA", "TRANSPARENCY_GFI"),
    rows_that_disagree: ("vac.fits", "50", "60"),
    cut_that_leaves_nothing: ("table.csv", "MOONALT > 5", "1809"),
    unknown_subset: ("moonlit", "moon, dark, twilight, all"),
    no_magnitude_within_reason: ("table.csv", "10-25"),
    words_for_numbers: ("table.csv", "MOONALT", "high"),
    fewer_nights_than_a_split_needs: ("at least 3 nights", "2"),
    fewer_nights_than_a_search_needs: ("at least 3 nights", "2"),
    split_by_a_column_that_is_not_there: ("NIGTH", "NIGHT"),
    unwritable_kind_of_output: ("out.xlsx", ".parquet"),
    too_few_simulated_exposures: ("1", "20"),
}


# --------------------------------------------------------------------------- space files


def space(text: str) -> Case:
    def case(folder: Path) -> list[str]:
        (folder / "mine.yaml").write_text(text)
        return ["search", str(folder / "mine.yaml"), "--runs", str(folder / "runs")]

    return case


def override(*given: str) -> Case:
    def case(folder: Path) -> list[str]:
        options = [word for value in given for word in ("--set", value)]
        return ["search", *options, "--runs", str(folder / "runs")]

    return case


SPACES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "no such space": (
        lambda folder: ["search", "quik", "--runs", str(folder / "runs")],
        ("quik", "quick"),
    ),
    "not YAML": (space("space: [1,"), ("mine.yaml",)),
    "a list": (space("- a\n- b\n"), ("mine.yaml",)),
    "an unknown section": (space("sapce: {}\n"), ("mine.yaml", "sapce", "space")),
    "an unknown key": (space("search: {trails: 3}\n"), ("mine.yaml", "search.trails", "trials")),
    "an unknown hyperparameter": (space("space: {widht: 3}\n"), ("mine.yaml", "widht", "width")),
    "low above high": (
        space("space: {width: {low: 64, high: 16}}\n"),
        ("mine.yaml", "space.width", "64", "16"),
    ),
    "low equal to high": (
        space("space: {width: {low: 64, high: 64}}\n"),
        ("mine.yaml", "space.width", "64"),
    ),
    "log of 0": (
        space("space: {huber_delta: {low: 0, high: 1, log: true}}\n"),
        ("mine.yaml", "space.huber_delta", "0"),
    ),
    "an empty choice": (
        space("space: {width: {choices: []}}\n"),
        ("mine.yaml", "space.width", "choices"),
    ),
    "a word for a number": (
        space("search: {trials: many}\n"),
        ("mine.yaml", "search.trials", "many"),
    ),
    "a negative learning rate": (space("space: {learning_rate: -1}\n"), ("learning_rate", "-1")),
    "an override of nothing": (override("space.depht.high=4"), ("depht", "depth")),
    "an override without a value": (override("search.trials"), ("--set", "search.trials")),
    "an override of a wrong type": (override("search.trials=lots"), ("search.trials", "lots")),
    "no trial": (lambda folder: ["search", "--trials", "0"], ("search.trials", "0")),
    "no epoch": (lambda folder: ["search", "--epochs", "0"], ("training.epochs", "0")),
    "a negative share of a GPU": (lambda folder: ["search", "--gpus", "-1"], ("gpus", "-1")),
    "a time that is none": (lambda folder: ["search", "--time-limit", "soon"], ("soon", "10m")),
    "a name that leaves its folder": (
        lambda folder: ["search", "--name", "../out", "--runs", str(folder / "runs")],
        ("../out", "name"),
    ),
    "a run that is not there": (
        lambda folder: ["resume", str(folder / "nothing")],
        ("nothing", "not a run"),
    ),
    "a leaderboard of nothing": (
        lambda folder: ["leaderboard", str(folder / "nothing")],
        ("nothing", "not a run"),
    ),
    "an export of nothing": (
        lambda folder: ["export", str(folder / "nothing"), str(folder / "out.eqx")],
        ("nothing", "not a run"),
    ),
    "a network of no layers": (lambda folder: ["train", "--depth", "0"], ("depth", "0")),
    "a trial of no run": (lambda folder: ["train", "--trial", "3"], ("--trial", "--from-run")),
}


# --------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good checkpoint: 6 -> 8 -> 8 -> 4."""
    import jax

    from desisky_tune.io import checkpoint_meta, save
    from desisky_tune.models.broadband import make_broadbandMLP

    model = make_broadbandMLP(
        in_size=6, out_size=4, width_size=8, depth=2, key=jax.random.PRNGKey(0)
    )
    path = tmp_path_factory.mktemp("whole") / "whole.eqx"
    save(path, model, checkpoint_meta(model, features=FEATURES))
    return path.read_bytes()


def with_header(content: bytes, **changes: Any) -> bytes:
    line, _, leaves = content.partition(b"\n")
    header = json.loads(line)
    header.update(changes)
    return json.dumps(header).encode() + b"\n" + leaves


def arch(**changes: Any) -> dict[str, Any]:
    return {"in_size": 6, "out_size": 4, "width_size": 8, "depth": 2, **changes}


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


CHECKPOINTS: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "truncated": (lambda whole: whole[:-100], ()),
    "cut within the header": (lambda whole: whole[:20], ()),
    "empty": (lambda whole: b"", ()),
    "a broken header": (lambda whole: b'{"schema": 1, arch}\n' + whole, ()),
    "an enormous header": (lambda whole: b'{"x": "' + b"a" * 50_000_000, ()),
    "a header of another shape": (lambda whole: b"[1, 2]\n" + whole, ()),
    "a fifth key in arch": (
        lambda whole: with_header(whole, arch=arch(activation="tanh")),
        ("activation",),
    ),
    "an absurd width": (
        lambda whole: with_header(whole, arch=arch(width_size=10_000_000)),
        ("10000000",),
    ),
    "an absurd depth": (lambda whole: with_header(whole, arch=arch(depth=10**9)), ("1000000000",)),
    "a negative width": (lambda whole: with_header(whole, arch=arch(width_size=-8)), ("-8",)),
    "leaves of other shapes": (lambda whole: with_header(whole, arch=arch(width_size=9)), ()),
    "unknown features": (
        lambda whole: with_header(whole, features=["MOONSEPP", *FEATURES[1:]]),
        ("MOONSEPP",),
    ),
    "a pickle": (lambda whole: pickle.dumps(Trap("trap-was-sprung")), ()),
    "a pickle behind a header": (
        lambda whole: whole.partition(b"\n")[0] + b"\n" + pickle.dumps(Trap("trap-was-sprung")),
        (),
    ),
    "an array of pickles behind a header": (
        lambda whole: whole.partition(b"\n")[0] + b"\n" + pickled_array(),
        (),
    ),
}


def pickled_array() -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, np.array([Trap("trap-was-sprung")], dtype=object), allow_pickle=True)
    return stream.getvalue()


# -------------------------------------------------------------------------------- checks


def check(
    argv: list[str], pieces: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    code, out, err = run(argv, capsys)
    assert code == 2, err
    assert out == ""
    assert err.startswith("desisky-tune: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err
    assert contents(folder) == before
    assert not (folder / "runs").exists() or not any((folder / "runs").iterdir())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.__name__)
def test_tables_and_catalogues(
    case: Case, here: Path, capsys: pytest.CaptureFixture[str], ray_instance: Any
) -> None:
    check(case(here), TABLES[case], here, capsys)


@pytest.mark.parametrize("case", SPACES)
def test_spaces_and_runs(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, pieces = SPACES[case]
    check(prepare(here), pieces, here, capsys)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(
    case: str, whole: bytes, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, pieces = CHECKPOINTS[case]
    (here / "bad.eqx").write_bytes(spoil(whole))
    exposures = csv(here, sv1_table())
    check(["predict", "bad.eqx", exposures, "out.csv"], ("bad.eqx", *pieces), here, capsys)
    check(["evaluate", "bad.eqx"], ("bad.eqx", *pieces), here, capsys)
    assert not (here / "trap-was-sprung").exists()


def test_a_good_checkpoint_is_no_bad_input(
    whole: bytes, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "good.eqx").write_bytes(whole)
    code, out, err = run(["predict", "good.eqx", csv(here, sv1_table()), "out.csv"], capsys)
    assert code == 0, err
    assert out == "out.csv\n"


def test_a_missing_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(["evaluate", "none.eqx"], ("none.eqx", "No such file"), here, capsys)


def test_a_table_that_lacks_a_feature(
    whole: bytes, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "good.eqx").write_bytes(whole)
    exposures = csv(here, sv1_table().drop(columns=["TRANSPARENCY_GFA"]))
    check(["predict", "good.eqx", exposures, "out.csv"], ("TRANSPARENCY_GFA",), here, capsys)


@pytest.mark.parametrize(
    ("argv", "piece"),
    [
        (["no-such-command"], "no-such-command"),
        (["search", "--no-such-option"], "--no-such-option"),
        (["search", "--trials", "many"], "--trials"),
        (["predict", "only-one"], "TABLE"),
        (["leaderboard", "run", "--json", "--csv"], "--csv"),
        (["evaluate", "some.eqx", "--rows", "most"], "most"),
        (["evaluate", "some.eqx", "--split-from", "run", "--data", "sv1"], "--split-from"),
        (["train", "--from-run", "run", "--data", "sv1"], "--from-run"),
    ],
)
def test_usage(argv: list[str], piece: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(argv, (piece,), here, capsys)


# ------------------------------------------------------------------ network and full disks


@pytest.fixture
def closed_port() -> int:
    """A port of the loopback address on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def release_from(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = replace(vac.RELEASES["v1.0"], url=url)
    monkeypatch.setattr(vac, "RELEASES", {"v1.0": release})


def test_no_network(
    closed_port: int,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"http://127.0.0.1:{closed_port}/vac.fits"
    release_from(url, monkeypatch)
    check(["data", "fetch", "--root", "data"], (url,), here, capsys)


def test_no_cluster(closed_port: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{closed_port}"
    check(["search", "--address", address, "--runs", "runs"], (address,), here, capsys)
    check(["search", "--address", "nonsense", "--runs", "runs"], ("HOST:PORT",), here, capsys)


def test_a_catalogue_that_was_never_fetched(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DESISKY_DATA_DIR", str(here / "data"))
    check(["data", "info", "vac"], ("data fetch",), here, capsys)


def test_checksum_mismatch(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(served))

        def log_message(self, *args: object) -> None:
            pass

    served = here / "served"
    served.mkdir()
    (served / "vac.fits").write_bytes(b"not the catalogue" * 1000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/vac.fits"
            release_from(url, monkeypatch)
            check(["data", "fetch", "--root", "data"], ("checksum",), here, capsys)
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "ecsv", "fits"])
def test_a_disk_that_is_full(suffix: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with room_for(8192):
        check(["data", "ingest", "sv1", f"out.{suffix}"], (f"out.{suffix}",), here, capsys)


def test_a_disk_that_is_full_while_a_catalogue_is_simulated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with room_for(100_000):
        check(["data", "simulate", "--exposures", "40", "out.fits"], ("out.fits",), here, capsys)


def test_what_was_there_survives_a_full_disk(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "out.csv").write_text("precious\n")
    with room_for(8192):
        check(["data", "ingest", "sv1", "out.csv"], ("out.csv",), here, capsys)
    assert (here / "out.csv").read_text() == "precious\n"


# ------------------------------------------------------- dropped and counted, not refused


def test_absurd_and_missing_magnitudes_are_dropped_and_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sv1_table()
    moonlit = table[
        (table["SUNALT"] < -20)
        & (table["MOONALT"] > 5)
        & (table["MOONFRAC"] > 0.5)
        & (table["MOONSEP"] <= 90)
        & (table["TRANSPARENCY_GFA"] > 0)
    ]
    magnitudes = moonlit[[f"SKY_MAG_{band}_SPEC" for band in "GRZ"]]
    missing = magnitudes.isna().any(axis=1)
    absurd = ((magnitudes < 10) | (magnitudes > 25)).any(axis=1) & ~missing
    assert missing.any()
    assert absurd.any()
    code, _, err = run(["data", "ingest", "sv1", "out.parquet"], capsys)
    assert code == 0
    kept = len(moonlit) - missing.sum() - absurd.sum()
    assert f"{kept} exposures of 1809" in err
    assert f"magnitude missing {missing.sum()}" in err
    assert f"magnitude outside 10-25 {absurd.sum()}" in err
    assert len(pd.read_parquet(here / "out.parquet")) == kept


def test_a_fits_table_of_exposures_is_a_table(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sv1_table()
    records = table.to_records(index=False)
    fits.BinTableHDU(np.asarray(records)).writeto(here / "table.fits")
    code, out, err = run(["data", "info", "table.fits", "--json"], capsys)
    assert code == 0, err
    assert json.loads(out)["rows"] == len(table)
