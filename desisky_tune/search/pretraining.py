"""Transfer: the weights that trainings begin with, where they are not drawn.

They are pretrained on a simulated catalogue, or given (`desisky_tune.search.given_weights`).
Either way they lie in the run's folder ``pretrained/`` as ordinary checkpoints, on raw features:
a resume needs nothing else, and who begins a training unfolds them into the scaling of its own
rows. So a training has one scaling, that of its training rows, and before its first epoch the
predictions of the weights that it began with.

What pretraining gives is a function of (width, depth, seed, settings). Whoever needs it first
trains it; all others read that file.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, NIGHT, TARGETS
from desisky_tune.errors import CheckpointError, DesiskyTuneError, InputError, RunError
from desisky_tune.files import atomic_path, first_path
from desisky_tune.search.arrays import SearchArrays
from desisky_tune.search.given_weights import GivenWeights, read_given
from desisky_tune.search.hyperparameters import in_full, is_documented_default
from desisky_tune.search.patience import TRIAL_PATIENCE, Result, StorageWatch, patiently
from desisky_tune.search.space import PretrainSpec, SearchSpec

if TYPE_CHECKING:
    import pandas as pd

    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.splits import Split
    from desisky_tune.search.figures import Meter
    from desisky_tune.search.folder import RunFolder
    from desisky_tune.search.origin import SearchRun
    from desisky_tune.search.storage import RunMirror
    from desisky_tune.training.scaling import Scaling

#: Of the simulated nights one in this many is not trained on, and chooses the epoch.
FOLDS = 5

GIVEN, SIMULATED_ROWS = "given.eqx", "simulated.parquet"


@dataclass(frozen=True)
class Pretraining:
    """What the trainings of a run begin with, as it travels to whoever trains.

    Attributes
    ----------
    folder
        Of the weights, in the run's.
    features
        Names of the inputs.
    settings
        The section ``pretrain`` of the specification.
    loss
        Of the pretraining: the search's.
    note
        Where the weights come from, for the headers of checkpoints.
    rows
        Simulated rows, one fold; None for given weights.
    mirror
        Where a run on a URL has its files.
    """

    folder: Path
    features: tuple[str, ...]
    settings: PretrainSpec
    loss: str
    note: Mapping[str, Any]
    rows: SearchArrays | None
    mirror: RunMirror | None = None


@dataclass(frozen=True)
class Prepared:
    """What a new run begins with, before it has a folder; `write` puts it there."""

    note: dict[str, Any]
    simulated: pd.DataFrame | None = None
    given: GivenWeights | None = None

    def write(self, folder: RunFolder, features: tuple[str, ...]) -> None:
        """Write simulated rows, or given weights, into the folder of a run."""
        if self.simulated is not None:
            path = folder.pretrained / SIMULATED_ROWS
            with atomic_path(path) as temporary:
                self.simulated.to_parquet(temporary)
        else:
            from desisky_tune.io import checkpoint_meta, save
            from desisky_tune.models.broadband import mlp_of_layers

            assert self.given is not None
            path = folder.pretrained / GIVEN
            model = mlp_of_layers(self.given.layers)
            save(path, model, checkpoint_meta(model, features=features, pretrain=self.note))
        folder.kept(path)


def prepare_pretraining(spec: SearchSpec, table: FeatureTable, split: Split) -> Prepared | None:
    """Make ready what the trainings of a new search begin with; None where they are drawn.

    Raises
    ------
    InputError
        When given weights cannot be used (`read_given`), or a feature is not simulated.
    """
    if spec.pretrain is None:
        return None
    if not spec.pretrain.simulated:
        given = read_given(spec, table, split)
        return Prepared(given.note, given=given)
    frame = simulate(spec)
    settings = spec.pretrain
    return Prepared(
        {
            "source": settings.source,
            **{name: getattr(settings, name) for name in ("exposures", "seed", "epochs")},
            **{name: getattr(settings, name) for name in ("learning_rate", "batch_size")},
            "subset": spec.data.subset,
            "rows": len(frame),
            "constants": _constants_note(),
        },
        simulated=frame,
    )


def simulate(spec: SearchSpec) -> pd.DataFrame:
    """Return the simulated rows of a search: NIGHT, its features, the magnitudes.

    Raises
    ------
    InputError
        When a feature is not simulated.
    """
    from desisky_tune.data.simulated_table import SIMULATED_COLUMNS, simulated_table

    settings = spec.pretrain
    assert settings is not None
    unknown = [name for name in spec.data.features if name not in SIMULATED_COLUMNS]
    if unknown:
        raise InputError(
            f"data.features: {unknown[0]} is not simulated, and pretrain is {settings.source}; "
            f"allowed: {', '.join(SIMULATED_COLUMNS)}"
        )
    frame = simulated_table(settings.exposures, settings.seed, spec.data.subset)
    columns = list(dict.fromkeys([NIGHT, *spec.data.features, *TARGETS]))
    usable = np.isfinite(frame[columns].to_numpy(dtype=float)).all(axis=1)
    return frame.loc[usable, columns].reset_index(drop=True)


def open_pretraining(run: SearchRun) -> Pretraining | None:
    """Return what the trainings of a run begin with; None where they are drawn.

    Raises
    ------
    RunError
        When given weights are no longer in its folder.
    """
    spec, folder = run.spec, run.folder
    if spec.pretrain is None:
        return None
    rows = None
    if spec.pretrain.simulated:
        rows = _simulated_rows(run)
    else:
        folder.fetched(folder.pretrained / GIVEN)
        if not (folder.pretrained / GIVEN).is_file():
            raise RunError(f"{folder.pretrained / GIVEN} is missing: the trials began with it")
    return Pretraining(
        folder=folder.pretrained,
        features=spec.data.features,
        settings=spec.pretrain,
        loss=spec.training.loss,
        note=folder.read_search()["pretrain"],
        rows=rows,
        mirror=folder.mirror,
    )


def _simulated_rows(run: SearchRun) -> SearchArrays:
    """Return the run's simulated rows; where they are lost, they are simulated again."""
    from desisky_tune.data.features import FeatureTable
    from desisky_tune.data.parquet import read_parquet
    from desisky_tune.data.splits import make_folds

    path = run.folder.pretrained / SIMULATED_ROWS
    run.folder.fetched(path)
    try:
        frame = read_parquet(path).to_pandas()
    except (OSError, ValueError):
        frame = simulate(run.spec)
    fold = make_folds(frame, np.arange(len(frame)), folds=FOLDS, seed=0)[0]
    table = FeatureTable(frame, {"v_derived": False})
    return SearchArrays.from_folds(table, [fold], run.spec.data.features)


class PretrainedWeights:
    """Gives trainings the weights that they begin with; any thread may ask.

    Parameters
    ----------
    pretraining
        From `open_pretraining`; None where all weights are drawn.
    meter
        Told the time that pretraining takes: once a shape and seed, as a compile.
    watch
        Told where storage fails, and when it is back.
    """

    def __init__(
        self,
        pretraining: Pretraining | None,
        meter: Meter | None = None,
        watch: StorageWatch | None = None,
    ) -> None:
        self._plan = pretraining
        self._meter = meter
        self._watch = watch
        self._shapes: dict[tuple[int, int], threading.Lock] = {}
        self._lock = threading.Lock()

    def initial_model(
        self, configuration: Mapping[str, Any], seed: int, scaling: Scaling
    ) -> Any | None:
        """Return the MLP that a training begins with, in its scaled space; None to draw one.

        Raises
        ------
        DesiskyTuneError
            When the pretraining diverged.
        InputError
            When given weights have another width or depth.
        """
        if not self._applies(configuration):
            return None
        from desisky_tune.training.scaling import unfold

        width, depth = int(configuration["width"]), int(configuration["depth"])
        assert self._plan is not None
        if self._plan.rows is None:
            model = self._given(width, depth)
        else:
            model = self._simulated(width, depth, seed)
        return unfold(model, scaling)

    def header(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint's header says of the weights that its training began with."""
        if not self._applies(configuration):
            return {}
        assert self._plan is not None
        return {"pretrain": dict(self._plan.note)}

    def _applies(self, configuration: Mapping[str, Any]) -> bool:
        return self._plan is not None and not is_documented_default(configuration)

    def _given(self, width: int, depth: int) -> Any:
        assert self._plan is not None
        model = self._read(self._plan.folder / GIVEN)
        if (model.width_size, model.depth) != (width, depth):
            raise InputError(
                f"pretrain.source = {self._plan.settings.source!r}: these weights have width "
                f"{model.width_size} and depth {model.depth}, not {width} and {depth}"
            )
        return model

    def _simulated(self, width: int, depth: int, seed: int) -> Any:
        plan = self._plan
        assert plan is not None
        path = plan.folder / f"{width}x{depth}-seed{seed}.eqx"
        with self._lock:
            lock = self._shapes.setdefault((width, depth), threading.Lock())
        # Nobody else compiles or trains what the first one does.
        with lock:
            try:
                return self._read(path)
            except CheckpointError:
                self._patiently(functools.partial(path.unlink, missing_ok=True))
            except FileNotFoundError:
                pass
            write = functools.partial(_pretrain, plan, width, depth, seed, path, self._watch)
            if self._meter is None:
                write()
            else:
                with self._meter.spending("compiling"):
                    write()
            if plan.mirror is not None:
                self._patiently(functools.partial(plan.mirror.put, path))
            return self._read(path)

    def _read(self, path: Path) -> Any:
        from desisky_tune.io import load
        from desisky_tune.models import make_broadbandMLP

        assert self._plan is not None
        if self._plan.mirror is not None:
            self._patiently(functools.partial(self._plan.mirror.fetch, path))
        return load(path, make_broadbandMLP)[0]

    def _patiently(self, action: Callable[[], Result]) -> Result:
        return patiently(action, watch=self._watch, limit=TRIAL_PATIENCE)


def _pretrain(
    plan: Pretraining, width: int, depth: int, seed: int, path: Path, watch: StorageWatch | None
) -> None:
    """Train one shape on the simulated rows, and keep its best epoch on the nights held out."""
    from desisky_tune.io import checkpoint_meta, save
    from desisky_tune.training.program import Hyperparameters, program_for, training_arrays
    from desisky_tune.training.scaling import Scaling, fold

    assert plan.rows is not None
    train, validation = plan.rows.training_rows(), plan.rows.validation_rows()
    scaling = Scaling.fit(*train)
    settings = plan.settings
    program = program_for(
        in_size=len(plan.features),
        out_size=len(BANDS),
        width=width,
        depth=depth,
        batch_size=settings.batch_size,
        loss=plan.loss,
        select="rmse",
    )
    rates = Hyperparameters(settings.learning_rate, float(in_full({})["huber_delta"]))
    arrays = training_arrays(*train, *validation, scaling)
    state, curve = program.advance(program.init(seed), arrays, rates, settings.epochs)
    if curve.failed:
        raise DesiskyTuneError(
            f"pretraining of {width} x {depth} diverged in epoch {len(curve) - 1}; lower "
            f"pretrain.learning_rate (now {settings.learning_rate:g})"
        )
    best = int(state.best_epoch)
    model = fold(program.best_model(state), scaling)
    meta = checkpoint_meta(
        model,
        features=plan.features,
        scaling=scaling,
        training={
            "epoch": best,
            "test_loss": float(curve.test_loss[best]),
            "train_loss": float(curve.train_loss[best]),
            "per_band_rmse": dict(zip(BANDS, map(float, curve.rmse[best]), strict=True)),
            "config": {"epochs": settings.epochs, "learning_rate": settings.learning_rate},
        },
        pretrain=dict(plan.note),
        seed=seed,
    )

    def keep() -> None:
        # Another machine's may differ in its last bits: the first one is everybody's.
        with first_path(path) as temporary:
            save(temporary, model, meta)

    patiently(keep, watch=watch, limit=TRIAL_PATIENCE)


def pretrain_sentence(note: Mapping[str, Any]) -> str:
    """Say where the weights of a run's trials come from, and what that means for its figures."""
    default = "the documented default did not"
    if note["source"] == "simulated":
        return (
            f"trials began with weights pretrained on {note['rows']} simulated exposures "
            f"({default}); {note['constants']}: figures on those exposures, test rows too, "
            "flatter what was pretrained"
        )
    seen = note["seen"]
    if seen is None:
        what = "which exposures these were trained on is not recorded: test rows may be among them"
    else:
        what = (
            f"these were trained on {seen['validation']} of this run's validation exposures, and "
            "on none of its test exposures"
        )
    return f"trials began with the weights of {note['source']} ({default}); {what}"


def _constants_note() -> str:
    from desisky_tune.data.simulated_table import CONSTANTS_NOTE

    return CONSTANTS_NOTE
