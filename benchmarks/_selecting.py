"""What the benchmarks of the selection share: its stages without Ray, and files of lines.

The stages are those of a search: configurations on one holdout, finalists on folds and seeds,
final fits. Here a random sampler draws the configurations, every trial is trained in full, and
all of it happens in the process that asks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from desisky_tune.files import append_line

#: Seeds of the fits whose mean is taken.
MEAN_OF = 5


class Stages:
    """A random search on a holdout and its finalists, on the rows of one run.

    Parameters
    ----------
    run
        The run; its folder is empty but for `search.json`.
    seed
        Of the sampler.
    """

    def __init__(self, run: Any, seed: int) -> None:
        self.run = run
        self.seed = seed

    @property
    def finalist_members(self) -> Any:
        """What each finalist trains."""
        from desisky_tune.search.folds import finalist_members

        return finalist_members(self.run.spec)

    def search(self) -> list[Any]:
        """Train the documented default and random configurations on the holdout's rows."""
        import optuna

        from desisky_tune.search.folds import search_arrays
        from desisky_tune.search.space import default_configuration

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        spec = self.run.spec
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.seed))
        configurations = [default_configuration()]
        configurations += [spec.suggest(study.ask()) for _ in range(spec.search.trials - 1)]
        return self.train(
            dict(enumerate(configurations)), search_arrays(self.run), (), self.run.folder.ledger
        )

    def finalists(self, records: list[Any]) -> Any:
        """Train the finalists and rank them."""
        from desisky_tune.search.finalists import conclude_finalists, fixed_finalists

        finalists = fixed_finalists(self.run, records)
        self.on_folds(
            {each.number: each.configuration for each in finalists}, self.run.folder.finalists
        )
        return conclude_finalists(self.run)

    def on_folds(self, configurations: Mapping[int, Any], ledger: Path) -> list[Any]:
        """Train configurations on the finalists' folds and seeds; return their records."""
        from desisky_tune.search.folds import finalist_arrays

        return self.train(configurations, finalist_arrays(self.run), self.finalist_members, ledger)

    def train(
        self, configurations: Mapping[int, Any], arrays: Any, members: Any, ledger: Path
    ) -> list[Any]:
        """Train configurations in full, one after another; return their records."""
        from desisky_tune.search.backend import Assignment
        from desisky_tune.search.local import LocalBackend
        from desisky_tune.search.records import Ledger, finish

        training = self.run.spec.training
        backend = LocalBackend(arrays, training, self.run.folder.trials)
        records = []
        for number, configuration in configurations.items():
            trial = Assignment(
                number, configuration, training.seed, members, keep_members=bool(members)
            )
            result = backend.advance(trial, training.epochs).as_result()
            backend.release(trial)
            records.append(
                finish(
                    number=number,
                    configuration=configuration,
                    result={**result, "members": max(1, len(members))},
                    max_epochs=training.epochs,
                    seed=training.seed,
                )
            )
            Ledger(ledger).append(records[-1])
        return records

    def mean_fit(self, name: str, record: Any) -> Any:
        """Fit a trial that was measured on folds to all rows with `MEAN_OF` seeds."""
        from desisky_tune.inference import Predictor
        from desisky_tune.search.final_fit import fit_of, write_final_fit

        path = self.run.folder.path / f"{name}-mean.eqx"
        write_final_fit(self.run, fit_of(record, {}), path, MEAN_OF)
        return Predictor.load(path)

    def committees(self, final: Any) -> dict[str, tuple[Any, Any]]:
        """Return what a search exports, and the same without the classical model's voice.

        By name: the committee (`desisky_tune.search.committee.Committee`) and its predictor.
        """
        from desisky_tune.inference import Predictor
        from desisky_tune.search.committee import form_committee, write_committee
        from desisky_tune.search.ensemble import mean_out_of_fold

        whole = form_committee(self.run, final)
        assert whole is not None
        networks = replace(whole, voice=None, unseen=mean_out_of_fold(final, whole.numbers))
        return {
            name: (
                each,
                Predictor.load(
                    write_committee(self.run, final, each, self.run.folder.path / f"{name}.eqx")
                ),
            )
            for name, each in {"committee": whole, "networks": networks}.items()
        }

    def members_mean(self, number: int, frame: Any) -> np.ndarray:
        """Return what a finalist's trainings on the folds predict, the mean of one on each."""
        from desisky_tune.inference import Predictor
        from desisky_tune.search.local import member_path

        members = self.finalist_members
        first = min(member.seed for member in members)
        paths = [
            member_path(self.run.folder.trials, number, member)
            for member in members
            if member.seed == first
        ]
        return np.mean([Predictor.load(path).predict(frame) for path in paths], axis=0)


def selection_spec(settings: Mapping[str, Any], seed: int) -> Any:
    """Return the search's specification; a final fit is one training unless asked otherwise."""
    from desisky_tune.search.space import load_spec

    return load_spec(
        settings["space"],
        (
            f"search.trials={settings['trials']}",
            f"training.epochs={settings['epochs']}",
            f"evaluation.finalists={settings['finalists']}",
            f"evaluation.finalist_folds={settings['folds']}",
            f"evaluation.finalist_seeds={settings['seeds']}",
            f"evaluation.committee={settings['members']}",
            "evaluation.final_seeds=1",
            f"split.seed={seed}",
        ),
    )


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a search and its finalists are done."""
    parser.add_argument("--trials", type=int, default=24, help="of the random search")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--finalists", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5, help="of the finalists")
    parser.add_argument("--seeds", type=int, default=2, help="of the finalists")
    parser.add_argument("--members", type=int, default=3, help="finalists in the ensemble")
    parser.add_argument("--space", default="quick")
    parser.add_argument("--processes", "--workers", type=int, default=2)
    parser.add_argument("--report-only", action="store_true")


@contextmanager
def own_folder(name: str) -> Iterator[Path]:
    """Yield an empty folder for one process's trainings, on the CPU."""
    from desisky_tune.search.local import process_environment

    os.environ.update(process_environment(gpu=False))
    with tempfile.TemporaryDirectory(prefix=f"desisky-tune-{name}-") as folder:
        yield Path(folder)


def read_lines(path: Path, settings: Mapping[str, Any], key: Sequence[str]) -> list[dict[str, Any]]:
    """Return the finished cells of a file; a last line that was cut off is none."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["settings"] != dict(settings):
            raise SystemExit(f"{path}: made with {line['settings']}; give another --out")
        lines[tuple(line[name] for name in key)] = line
    return list(lines.values())


def in_processes(
    work: Callable[..., dict[str, Any]],
    cells: Sequence[tuple[Any, ...]],
    settings: Mapping[str, Any],
    out: Path,
    processes: int,
    called: str,
) -> None:
    """Do the work of every cell, each in one process, and append its line when it is done."""
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = [pool.submit(work, dict(settings), *cell) for cell in cells]
        for done, future in enumerate(as_completed(waiting), start=1):
            append_line(out, json.dumps(future.result()))
            pace = (time.perf_counter() - began) / done
            left = pace * (len(cells) - done)
            print(f"{done} of {len(cells)} {called}, about {left:.0f} s left", flush=True)
    if cells:
        print(flush=True)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % t interval of a mean; NaN for one value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def t_interval(values: np.ndarray) -> str:
    """Return the 95 % t interval of a mean as text."""
    if len(values) < 2:
        return "-"
    low, high = mean_interval(values)
    return f"{low:+.4f} to {high:+.4f}"
