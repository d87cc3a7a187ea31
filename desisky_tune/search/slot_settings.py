"""Which program trains a configuration, settled once for a run."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from desisky_tune.errors import InputError
from desisky_tune.search.hyperparameters import of_training
from desisky_tune.search.parameters import Fixed, Parameter
from desisky_tune.training.widths import padded_width

if TYPE_CHECKING:
    from desisky_tune.search.space import SearchSpec
    from desisky_tune.training.slot_rows import SlotRows
    from desisky_tune.training.slots import SlotShape

#: What a calibration found, beside the states of a run's trials.
FILE = "slots.json"


class _Settled(NamedTuple):
    """Slots at the reference shape, slots that can be filled, and bytes of the device's memory."""

    slots: int
    expected: int
    memory: int


def expected_trainings(spec: SearchSpec, at_once: int, members: int) -> int:
    """Return how many trainings of one shape a search may have under way at a time.

    Parameters
    ----------
    spec
        The search. Its trials are taken to be spread over all depths, padded widths and batch
        sizes of its space.
    at_once
        Trials that are trained at a time.
    members
        Trainings of each.

    Returns
    -------
    int
        At least the members of one trial, which have one shape.
    """
    shapes = 1
    for name, key in (("depth", int), ("width", padded_width), ("batch_size", int)):
        shapes *= len({key(int(value)) for value in _values(spec.space[name])})
    return max(members, -(-at_once * members // shapes))


def _values(parameter: Parameter) -> list[Any]:
    """Return the values of a hyperparameter: all, or so many that none of note is left out."""
    if isinstance(parameter, Fixed):
        return [parameter.value]
    return [parameter.at(step / 256) for step in range(257)]


class SlotPlan:
    """Turns a configuration into the shape of its program.

    The number of slots is part of the shape, and a trial's numbers depend on it in their last
    bits. It is therefore settled before the first trial, at the default architecture, written
    down, and read by every engine of the run and by whoever resumes it. Programs of other depths
    and widths have as many slots as move the same bytes.

    Parameters
    ----------
    rows
        On the device.
    folder
        Where the states of the run's trials are.
    loss
        "huber" or "l2".
    slots
        In every program; None for a calibration.
    expected
        Trainings of one shape that may be under way at a time (`expected_trainings`): slots
        beyond them would cost a step's time and never be filled. None for any number.
    precision
        Of the matrix products.
    """

    def __init__(
        self,
        rows: SlotRows,
        folder: Path,
        loss: str,
        slots: int | None = None,
        expected: int | None = None,
        precision: str = "float32",
    ) -> None:
        if slots is not None and slots < 1:
            raise InputError(f"resources.slots is {slots}; it must be at least 1")
        self._rows = rows
        self._path = folder / FILE
        self._slots = slots
        self._common: dict[str, Any] = {
            "in_size": rows.factor.shape[1],
            "out_size": rows.target_mean.shape[1],
            "loss": loss,
            "precision": precision,
        }
        self._expected = expected
        self._settled: _Settled | None = None
        self._lock = threading.Lock()

    def shape(self, configuration: Mapping[str, Any]) -> SlotShape:
        """Return the shape that a configuration is trained in."""
        from desisky_tune.training.slot_count import most_slots, power_of_two, scaled_slots
        from desisky_tune.training.slots import SlotShape

        shape = SlotShape(
            depth=int(configuration["depth"]),
            width=padded_width(int(configuration["width"])),
            batch_size=int(configuration["batch_size"]),
            slots=self._slots or 1,
            extended=of_training(configuration, 1).extended,
            **self._common,
        )
        if self._slots is not None:
            return shape
        with self._lock:
            settled = self._settled = self._settled or self._settle()
        fitting = most_slots(shape, self._rows, settled.memory)
        wanted = min(scaled_slots(shape, self._reference(settled.slots)), settled.expected)
        return replace(shape, slots=power_of_two(min(wanted, fitting)))

    def _reference(self, slots: int = 1) -> SlotShape:
        from desisky_tune.training.slot_count import REFERENCE
        from desisky_tune.training.slots import SlotShape

        return SlotShape(**{**REFERENCE, **self._common}, slots=slots)

    def _settle(self) -> _Settled:
        """Read what was settled for this run, or calibrate and write it down."""
        from desisky_tune.training.slot_count import (
            calibrate,
            device_memory,
            first_try,
            most_slots,
        )

        found = self._read()
        if found is not None:
            return found
        memory, reference = device_memory(), self._reference()
        fitting = most_slots(reference, self._rows, memory)
        expected = fitting if self._expected is None else 1 << (self._expected - 1).bit_length()
        calibration = calibrate(reference, self._rows, min(fitting, expected), first=first_try())
        settled = _Settled(calibration.slots, expected, memory)
        self._write(settled)
        return self._read() or settled

    def _read(self) -> _Settled | None:
        try:
            found = json.loads(self._path.read_text())
            return _Settled(**{name: int(found[name]) for name in _Settled._fields})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, settled: _Settled) -> None:
        """Write what was found, unless another engine of the run was first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{FILE}.{secrets.token_hex(4)}.part")
        with open(temporary, "w") as stream:
            json.dump(settled._asdict(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        # A link, unlike a renaming, leaves alone what is there.
        with suppress(FileExistsError):
            os.link(temporary, self._path)
        temporary.unlink()
