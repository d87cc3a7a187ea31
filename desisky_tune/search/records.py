"""What a search keeps of each trial, and the ledger that a resume goes by.

`finish` alone turns a result into a state; `Ledger` keeps the records in a file to which
lines are only ever added. The Optuna study, the Parquet tables and the leaderboard are
derived from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from desisky_tune.data.columns import FEATURES, TARGETS
from desisky_tune.errors import RunError
from desisky_tune.files import append_line

#: Fields that ledgers of earlier versions do not have.
_ADDED_LATER: Mapping[str, Any] = {"members": 1, "spread": None}

State = Literal["COMPLETE", "PRUNED", "FAIL"]
STATES: tuple[str, ...] = get_args(State)


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial.

    Attributes
    ----------
    number
        The trial's number in the study.
    state
        ``COMPLETE``: trained in full, or until nothing better came for as long as
        ``early_stopping`` says. ``PRUNED``: stopped at a rung. ``FAIL``: its numbers cannot
        be used; `reason` says why.
    configuration
        Hyperparameters: width, depth, learning_rate, huber_delta, batch_size, and the
        optional ones that the space names.
    objective
        Lowest RMSE so far (mag), the mean of the bands; None where it failed.
    reason
        Why it failed, or None.
    best_epoch
        Epoch of the objective, counted from 0; None where it failed.
    epochs
        Epochs trained.
    rmse
        RMSE by band (mag) at the best epoch; None where it failed.
    seconds
        Time spent training.
    seed
        Of the initial weights and the shuffles.
    started, ended
        Seconds since 1970-01-01 UTC.
    rungs
        Objective at each rung reached, by epochs.
    curve
        Every epoch's losses and RMSE by band (mag), by name of series.
    members
        Trainings that its figures were made of: folds times seeds.
    spread
        Standard deviation of the objective over the seeds (mag); None with one seed.
    """

    number: int
    state: State
    configuration: dict[str, Any]
    objective: float | None
    reason: str | None
    best_epoch: int | None
    epochs: int
    rmse: dict[str, float] | None
    seconds: float
    seed: int
    started: float
    ended: float
    rungs: dict[int, float] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)
    members: int = 1
    spread: float | None = None

    @property
    def parameters(self) -> int:
        """Weights and biases of the model with the documented inputs and outputs."""
        return parameter_count(self.configuration)


def parameter_count(
    configuration: Mapping[str, Any], inputs: int = len(FEATURES), outputs: int = len(TARGETS)
) -> int:
    """Return the weights and biases of the MLP that a configuration describes."""
    width, depth = int(configuration["width"]), int(configuration["depth"])
    hidden = (depth - 1) * (width * width + width)
    return inputs * width + width + hidden + width * outputs + outputs


def finish(
    *,
    number: int,
    configuration: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    max_epochs: int,
    reason: str | None = None,
    seed: int = 0,
    started: float = 0.0,
    ended: float = 0.0,
    rungs: Mapping[int, float] | None = None,
) -> TrialRecord:
    """Turn the last result of a trial into its record. Nothing else decides a state.

    Parameters
    ----------
    number, configuration
        The trial.
    result
        Its last report, as `desisky_tune.search.backend.Progress.as_result` gives it
        (dictionaries in it may be flattened, as ``rmse/V``); None where there was none.
    max_epochs
        Epochs of a complete trial.
    reason
        Why it failed, where the result does not say.
    seed, started, ended
        For the record.
    rungs
        Objective at rungs that `result` does not hold, by epochs.

    Returns
    -------
    TrialRecord
        FAIL with a reason where there is a reason, no result, or a number in it that is
        not finite; else COMPLETE where it ended early by itself; else PRUNED below
        `max_epochs`; else COMPLETE.
    """
    result = result or {}
    epochs = int(result.get("epochs") or 0)
    objective = _number(result.get("objective"))
    rmse = {band: _number(value) for band, value in nested(result, "rmse").items()}
    seconds = _number(result.get("seconds"))
    reason = reason or result.get("reason") or _not_usable(epochs, objective, rmse)
    told: dict[Any, Any] = {**nested(result, "rungs"), **(rungs or {})}
    reached = {int(at): float(told[at]) for at in told if math.isfinite(told[at])}
    if reason is None:
        assert objective is not None
        reached[epochs] = objective
    pruned = epochs < max_epochs and not result.get("stopped")
    return TrialRecord(
        number=int(number),
        state="FAIL" if reason else "PRUNED" if pruned else "COMPLETE",
        configuration=dict(configuration),
        objective=None if reason else objective,
        reason=reason,
        best_epoch=None if reason else int(result["best_epoch"]),
        epochs=epochs,
        rmse=None if reason else {band: float(value or 0) for band, value in rmse.items()},
        seconds=seconds if seconds is not None and math.isfinite(seconds) else 0.0,
        seed=int(seed),
        started=float(started),
        ended=float(ended),
        rungs=dict(sorted(reached.items())),
        curve={
            name: [float(value) for value in series]
            for name, series in nested(result, "curve").items()
        },
        members=int(result.get("members") or 1),
        spread=None if reason else _number(result.get("spread")),
    )


def best_record(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the record that leads: COMPLETE, with the lowest objective.

    A tie goes to the model with fewer parameters, then to the lower number. A pruned
    trial never leads: nobody knows what it would have come to.
    """
    complete = [record for record in records if record.state == "COMPLETE"]
    return min(complete, key=_rank, default=None)


def _rank(record: TrialRecord) -> tuple[float, int, int]:
    objective = math.inf if record.objective is None else record.objective
    return objective, record.parameters, record.number


def remaining_trials(trials: int, records: Iterable[TrialRecord]) -> int:
    """Return how many of `trials` have no record yet."""
    return max(0, trials - len(list(records)))


class Ledger:
    """The finished trials of a run: a file of JSON lines, each appended and fsynced.

    A last line that a kill cut off counts as not written, and is removed before the next
    one is appended; `torn` says so. Of two lines with one number the first counts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._numbers: set[int] | None = None

    @property
    def torn(self) -> str | None:
        """What was found cut off at the end, in one line; None for a whole file."""
        _, whole, size = self._scan()
        if whole == size:
            return None
        return f"{self.path}: the last line was cut off ({size - whole} bytes) and does not count"

    def append(self, record: TrialRecord) -> bool:
        """Add a record; return False, and add nothing, where its number is there already."""
        if self._numbers is None:
            records, whole, size = self._scan()
            self._numbers = {each.number for each in records}
            if whole < size:
                with open(self.path, "r+b") as stream:
                    stream.truncate(whole)
        if record.number in self._numbers:
            return False
        try:
            append_line(self.path, record_to_json(record))
        except BaseException:
            # Part of the line may stand there: the next append looks, and cuts it off.
            self._numbers = None
            raise
        self._numbers.add(record.number)
        return True

    def records(self) -> list[TrialRecord]:
        """Return the records in the order in which the trials ended; none without a file.

        Raises
        ------
        RunError
            When a line other than the last cannot be read; the message names it.
        """
        return self._scan()[0]

    def _scan(self) -> tuple[list[TrialRecord], int, int]:
        """Return the records, the length of the whole lines, and that of the file (bytes)."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0, 0
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror or error}") from error
        records: dict[int, TrialRecord] = {}
        whole = 0
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                # Without its newline even a line that parses may be the front of a longer one.
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                record = record_from_json(line.decode())
            except ValueError as error:
                if number < len(lines):
                    raise RunError(
                        f"{self.path}, line {number}: not the record of a trial ({error}); "
                        "the ledger was changed by something else"
                    ) from error
                break
            records.setdefault(record.number, record)
            whole += len(line)
        return list(records.values()), whole, len(content)


def record_to_json(record: TrialRecord) -> str:
    """Return a record as one line of JSON; every float comes back bit for bit."""
    content = {each.name: _spell(getattr(record, each.name)) for each in fields(record)}
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def record_from_json(line: str) -> TrialRecord:
    """Read what `record_to_json` wrote.

    Raises
    ------
    ValueError
        When it is not JSON, lacks a field, or has a state that is not known.
    """
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    content = {**_ADDED_LATER, **content}
    missing = [each.name for each in fields(TrialRecord) if each.name not in content]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    if content["state"] not in STATES:
        raise ValueError(f"state {content['state']!r} is none of {', '.join(STATES)}")
    try:
        values = {each.name: content[each.name] for each in fields(TrialRecord)}
        values["rungs"] = {int(at): float(value) for at, value in values["rungs"].items()}
        values["curve"] = {
            name: [float(value) for value in series] for name, series in values["curve"].items()
        }
        values["number"] = int(values["number"])
        values["configuration"] = dict(values["configuration"])
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    return TrialRecord(**values)


def _spell(value: Any) -> Any:
    """Write what JSON has no number for (NaN, infinities) as text that float() reads."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _spell(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(inner) for inner in value]
    return value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def nested(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the dictionary `name` of a result, flattened (``name/key``) or not."""
    found = result.get(name)
    if isinstance(found, Mapping):
        return dict(found)
    prefix = f"{name}/"
    return {key[len(prefix) :]: value for key, value in result.items() if key.startswith(prefix)}


def _not_usable(
    epochs: int, objective: float | None, rmse: Mapping[str, float | None]
) -> str | None:
    """Why numbers cannot be used, or None."""
    if objective is None:
        return "ended without a report"
    if not math.isfinite(objective):
        return f"the objective is {objective} after {epochs} epochs"
    broken = [band for band, value in rmse.items() if value is None or not math.isfinite(value)]
    if broken:
        return f"the RMSE in {', '.join(broken)} is not finite after {epochs} epochs"
    return None


def write_tables(records: Iterable[TrialRecord], folder: str | Path) -> tuple[Path, Path]:
    """Write ``trials.parquet`` and ``curves.parquet``; see `desisky_tune.search.tables`."""
    from desisky_tune.search.tables import write_curves, write_trials

    ordered = sorted(records, key=lambda record: record.number)
    return write_trials(ordered, folder), write_curves(ordered, folder)
