"""What the documents and examples show runs, as it stands.

The catalogue is a small simulated one, placed where a downloaded one would lie.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from desisky_tune.data import simulate_vac
from desisky_tune.io import feature_names, load_model, read_header

ROOT = Path(__file__).parents[1]
CHECKPOINTS = Path(".cache", "desisky", "saved_models", "broadband")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")

#: The documented quick start of the training module, with the package's name changed.
DOCUMENTED_QUICK_START = """
from desisky_tune.data import SkySpecVAC
from desisky_tune.training import (
    SkyBrightnessDataset,
    NumpyLoader,
    BroadbandTrainer,
    TrainingConfig,
)
import equinox as eqx
import jax
from torch.utils.data import random_split
import torch

# 1. Load data
vac = SkySpecVAC(download=True)
wave, flux, meta = vac.load_moon_contaminated()

# 2. Create dataset
input_features = ['MOONSEP', 'MOONFRAC', 'MOONALT', 'OBSALT',
                  'TRANSPARENCY_GFA', 'ECLIPSE_FRAC']
dataset = SkyBrightnessDataset(meta, flux, input_features)

# 3. Split into train/test
train_set, test_set = random_split(dataset, [0.7, 0.3],
                                    generator=torch.Generator().manual_seed(42))

# 4. Create loaders
train_loader = NumpyLoader(train_set, batch_size=32, shuffle=True)
test_loader = NumpyLoader(test_set, batch_size=32, shuffle=False)

# 5. Create model
model = eqx.nn.MLP(in_size=6, out_size=4, width_size=128, depth=5,
                    key=jax.random.PRNGKey(42))

# 6. Configure training
config = TrainingConfig(
    epochs=500,
    learning_rate=1e-4,
    loss="huber",
    huber_delta=0.25,
    save_best=True,
    run_name="my_broadband_model"
)

# 7. Train!
trainer = BroadbandTrainer(model, config)
model, history = trainer.train(train_loader, test_loader)

print(f"Best test loss: {history.best_test_loss:.4f}")
"""

DOCUMENTED_CONFIGURATION = """
config = TrainingConfig(
    epochs=500,              # Number of training epochs
    learning_rate=1e-4,      # Learning rate for Adam optimizer
    loss="huber",            # Loss function: "l2" or "huber"
    huber_delta=0.25,        # Delta for Huber loss
    save_best=True,          # Save best model checkpoint
    save_dir=None,           # Custom save directory
    run_name="my_model",     # Name for checkpoint file
    print_every=50,          # Print progress every N epochs
    validate_every=1,        # Validate every N epochs
)
"""

DOCUMENTED_LOADING = """
from desisky_tune.io import load_model

# Load best checkpoint
model, meta = load_model("broadband", path="path/to/checkpoint.eqx")

# Access training metadata
print(f"Trained for {meta['training']['epoch']} epochs")
print(f"Test loss: {meta['training']['test_loss']:.4f}")
print(f"V-band RMSE: {meta['training']['per_band_rmse']['V']:.4f}")
"""

DOCUMENTED_OPTIMIZER = """
import optax

optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adam(1e-4)
)

trainer = BroadbandTrainer(model, config, optimizer=optimizer)
"""

DOCUMENTED_LOSS = """
from desisky_tune.training.losses import loss_func
import jax.numpy as jnp

def custom_loss(pred, targets):
    # Your custom loss here
    return jnp.mean((pred - targets) ** 2)
"""


# --- where the documents run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a simulated catalogue of 300 exposures, some 70 of them moonlit."""
    root = tmp_path_factory.mktemp("data")
    simulate_vac(root / "dr1" / "sky_spectra_vac_v1.fits", exposures=300, seed=1)
    return root


@pytest.fixture
def desk(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's empty folder, which is their home as well; no network is needed in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DESISKY_DATA_DIR", str(catalogue))
    # A kind that a page registers is gone after the test.
    monkeypatch.setattr("desisky_tune.io.registry.REGISTRY", {})
    return tmp_path


class Subset:
    """What torch.utils.data.Subset is: a dataset seen through a list of indices."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


class Generator:
    """What the quick start uses of torch.Generator."""

    def manual_seed(self, seed: int) -> Generator:
        self.draw = np.random.default_rng(seed)
        return self


def random_split(dataset: Any, fractions: Sequence[float], generator: Generator) -> list[Subset]:
    order = generator.draw.permutation(len(dataset)).tolist()
    first = len(dataset) - int(fractions[1] * len(dataset))
    return [Subset(dataset, order[:first]), Subset(dataset, order[first:])]


@pytest.fixture(params=["torch", "stand-in"])
def torch_splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch where it is installed; and a stand-in with its protocol, always."""
    if request.param == "torch":
        pytest.importorskip("torch", reason="PyTorch is no dependency; it is not installed here")
        return
    torch, utils, data = (
        types.ModuleType(name) for name in ("torch", "torch.utils", "torch.utils.data")
    )
    torch.Generator = Generator  # type: ignore[attr-defined]
    data.random_split = random_split  # type: ignore[attr-defined]
    data.Subset = Subset  # type: ignore[attr-defined]
    for module in (torch, utils, data):
        monkeypatch.setitem(sys.modules, module.__name__, module)


# --- the documented training module ---------------------------------------------------------------


@pytest.mark.usefixtures("torch_splits")
def test_documented_training_module_runs_as_written(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    exec(DOCUMENTED_QUICK_START, names)

    history = names["history"]
    assert len(history.train_losses) == 500
    assert history.best_test_loss == pytest.approx(np.nanmin(history.test_losses))
    assert history.best_test_loss < 0.5 * history.test_losses[0]
    assert f"Best test loss: {history.best_test_loss:.4f}" in capsys.readouterr().out

    path = desk / CHECKPOINTS / "my_broadband_model.eqx"
    exec(DOCUMENTED_LOADING.replace("path/to/checkpoint.eqx", str(path)), names)
    out = capsys.readouterr().out
    meta = names["meta"]
    assert f"Trained for {history.best_epoch} epochs" in out
    assert f"Test loss: {history.best_test_loss:.4f}" in out
    assert meta["arch"] == {"in_size": 6, "out_size": 4, "width_size": 128, "depth": 5}
    assert {"date", "epoch", "test_loss", "train_loss", "per_band_rmse", "config"} <= set(
        meta["training"]
    )
    assert list(meta["training"]["per_band_rmse"]) == ["V", "g", "r", "z"]
    assert meta["training"]["config"].items() >= {"epochs": 500, "loss": "huber"}.items()
    assert feature_names(meta) == tuple(names["input_features"])

    exec(DOCUMENTED_CONFIGURATION, names)
    names["config"].epochs = 3
    exec(DOCUMENTED_OPTIMIZER, names)
    _, history = names["trainer"].train(names["train_loader"], names["test_loader"])
    assert len(history.train_losses) == 3
    assert (desk / CHECKPOINTS / "my_model.eqx").exists()

    exec(DOCUMENTED_LOSS, names)
    curves = [l2_curve(names, loss) for loss in (names["custom_loss"], "l2")]
    # The documented custom loss is the mean squared residual, which has a name too.
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)


def l2_curve(names: dict[str, Any], loss: Any) -> list[float]:
    """The test losses of a short training with the quick start's loaders."""
    model = names["eqx"].nn.MLP(6, 4, 16, 2, key=names["jax"].random.PRNGKey(0))
    config = names["TrainingConfig"](5, 1e-4, loss=loss, save_best=False)
    trainer = names["BroadbandTrainer"](model, config)
    losses: list[float] = trainer.train(names["train_loader"], names["test_loader"])[1].test_losses
    return losses


# --- our pages ------------------------------------------------------------------------------------


def run_page(page: str, *, torch: bool = False) -> dict[str, Any]:
    """Execute the Python of a page from top to bottom; blocks for PyTorch only if asked."""
    text = (ROOT / "docs" / page).read_text()
    names: dict[str, Any] = {"__name__": page}
    for match in FENCE.finditer(text):
        language = match[1].strip()
        if language == "python" or (language == "python torch" and torch):
            line = text[: match.start()].count("\n") + 1
            exec(compile("\n" * line + match[2], f"docs/{page}", "exec"), names)
    return names


@pytest.mark.usefixtures("torch_splits")
def test_training_page_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("training.md", torch=True)
    written = {path.stem for path in (desk / CHECKPOINTS).iterdir()}
    assert written == {"my_broadband_model", "my_scaled_model", "clipped", "log_cosh"}
    scaled = read_header(desk / CHECKPOINTS / "my_scaled_model.eqx")
    assert feature_names(scaled) == tuple(names["input_features"])
    assert scaled["scaling"]["folded"] is True
    assert "classical" in capsys.readouterr().out
    inputs, targets, spectra = names["inputs"], names["targets"], names["spectra"]
    assert (inputs.shape[1], targets.shape[1], spectra.shape[1]) == (6, 4, 7781)
    assert len(names["train_set"]) + len(names["test_set"]) == len(names["dataset"])


def test_checkpoint_page_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("checkpoint-format.md")
    _, meta = load_model("broadband", path="reordered.eqx")
    assert feature_names(meta) == tuple(names["order"])
    assert "SKY_MAG_V_PRED" in capsys.readouterr().out


def test_visualization_page_runs(desk: Path) -> None:
    run_page("visualization.md")
    figures = {path.name for path in desk.iterdir() if path.suffix in (".png", ".svg")}
    assert figures == {"loss.png", "r-band.svg", "outliers-V.png"}


def test_data_page_runs(desk: Path) -> None:
    names = run_page("data.md")
    assert set(names["recorded"]) >= {"train", "validation", "test", "seed"}


#: What the tutorial's commands are given in a test: the same search, small.
SMALL = ("--trials", "3", "--epochs", "20", "--set", "search.grace=5")


def test_tutorial_runs_from_the_table_to_desisky(
    desk: Path,
    ray_instance: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from desisky_tune.cli import main
    from desisky_tune.visualization import report

    draw = report._figures
    monkeypatch.setattr(report, "_figures", lambda *given: islice(draw(*given), 2))
    text = (ROOT / "docs" / "tutorial.md").read_text()
    ran = []
    names: dict[str, Any] = {}
    for language, block in FENCE.findall(text):
        kind, _, name = language.partition(" ")
        if name == "exposures.csv":
            write_exposures(desk / name, block)
        elif kind in ("csv", "yaml"):
            (desk / name).write_text(block)
        elif kind == "python" and (name != "desisky" or find_spec("desisky")):
            exec(block, names)
        elif kind == "sh":
            for line in block.splitlines():
                program, *argv = shlex.split(line)
                if program == "pip":
                    continue
                assert program == "desisky-tune"
                ran.append(argv[0])
                if argv[0] == "search":
                    argv += SMALL
                assert main(argv) == 0, f"{line}: {capsys.readouterr().err}"
    assert ran == [
        *("--version", "data", "search", "resume", "leaderboard", "report"),
        *("evaluate", "predict", "export"),
    ]
    predicted = pd.read_csv(desk / "predicted.csv")
    assert len(predicted) == 2
    assert predicted["SKY_MAG_R_PRED"].between(14, 24).all()
    assert (desk / "runs" / "my-sky" / "report" / "index.html").is_file()
    assert (desk / "history.pdf").stat().st_size > 0
    if "r" in names:
        assert 14 < float(names["r"]) < 24


def write_exposures(path: Path, shown: str) -> None:
    """Write a reader's table: moonlit exposures of the sample, in the columns that are shown."""
    sample = ROOT / "desisky_tune" / "data" / "sample" / "desi-sv1-exposures.csv"
    magnitudes = {f"SKY_MAG_{band.upper()}_SPEC": band for band in "grz"}
    table = pd.read_csv(sample).query("MOONALT > 5 and MOONFRAC > 0.5 and SUNALT < -20")
    columns = shown.splitlines()[0].split(",")
    table.rename(columns=magnitudes)[columns].to_csv(path, index=False)


def test_pages_show_a_header_that_is_json() -> None:
    import json

    text = (ROOT / "docs" / "checkpoint-format.md").read_text()
    (block,) = [match[2] for match in FENCE.finditer(text) if match[1] == "json"]
    assert set(json.loads(block)["arch"]) == {"in_size", "out_size", "width_size", "depth"}


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    source = ROOT / "docs" / page
    for target in LINK.findall(source.read_text()):
        assert (source.parent / target).exists(), f"{page}: {target}"


# --- examples -------------------------------------------------------------------------------------


@pytest.fixture
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["example"])
    return


@pytest.mark.usefixtures("no_arguments")
def test_quick_start_and_loading_run_one_after_the_other(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / "quick_start.py"), run_name="__main__")
    assert (desk / "loss-curve.png").exists()
    runpy.run_path(str(ROOT / "examples" / "load_model.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "6 inputs, 128 x 5" in out
    assert "classical" in out


@pytest.mark.usefixtures("no_arguments")
@pytest.mark.parametrize("name", ["custom_optimizer", "custom_loss"])
def test_example_trains_and_saves(
    name: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "Best test loss" in capsys.readouterr().out
    assert feature_names(read_header(desk / CHECKPOINTS / f"{name}.eqx"))[0] == "MOONSEP"


def test_every_example_is_tested() -> None:
    tested = {"quick_start", "load_model", "custom_optimizer", "custom_loss"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested
