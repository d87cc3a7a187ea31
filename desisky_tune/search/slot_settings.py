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
from typing import TYPE_CHECKING, Any

from desisky_tune.errors import InputError

if TYPE_CHECKING:
    from desisky_tune.training.slot_rows import SlotRows
    from desisky_tune.training.slots import SlotShape

#: What a calibration found, beside the states of a run's trials.
FILE = "slots.json"


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
    precision
        Of the matrix products.
    """

    def __init__(
        self, rows: SlotRows, folder: Path, loss: str, slots: int | None, precision: str
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
        self._reference: SlotShape | None = None
        self._memory = 0
        self._lock = threading.Lock()

    def shape(self, configuration: Mapping[str, Any]) -> SlotShape:
        """Return the shape that a configuration is trained in."""
        from desisky_tune.training.slot_count import padded_width, scaled_slots
        from desisky_tune.training.slots import SlotShape

        shape = SlotShape(
            depth=int(configuration["depth"]),
            width=padded_width(int(configuration["width"])),
            batch_size=int(configuration["batch_size"]),
            slots=self._slots or 1,
            **self._common,
        )
        if self._slots is not None:
            return shape
        with self._lock:
            if self._reference is None:
                self._settle()
        assert self._reference is not None
        return replace(shape, slots=scaled_slots(shape, self._reference, self._rows, self._memory))

    def _settle(self) -> None:
        """Read what was calibrated for this run, or calibrate and write it down."""
        from desisky_tune.training.slot_count import (
            REFERENCE,
            calibrate,
            device_memory,
            first_try,
            most_slots,
        )
        from desisky_tune.training.slots import SlotShape

        reference = SlotShape(**{**REFERENCE, **self._common}, slots=1)
        found = self._read()
        if found is None:
            memory = device_memory()
            most = most_slots(reference, self._rows, memory)
            calibration = calibrate(reference, self._rows, most, first=first_try())
            self._write({"slots": calibration.slots, "memory": memory})
            found = self._read() or {"slots": calibration.slots, "memory": memory}
        self._reference = replace(reference, slots=found["slots"])
        self._memory = found["memory"]

    def _read(self) -> dict[str, int] | None:
        try:
            found = json.loads(self._path.read_text())
            return {name: int(found[name]) for name in ("slots", "memory")}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, found: Mapping[str, int]) -> None:
        """Write what was found, unless another engine of the run was first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{FILE}.{secrets.token_hex(4)}.part")
        with open(temporary, "w") as stream:
            json.dump(found, stream)
            stream.flush()
            os.fsync(stream.fileno())
        # A link, unlike a renaming, leaves alone what is there.
        with suppress(FileExistsError):
            os.link(temporary, self._path)
        temporary.unlink()
