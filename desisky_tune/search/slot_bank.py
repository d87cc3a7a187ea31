"""What sits in the slots of one program: trainings, their callers, and what came of them."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desisky_tune.training.arrays import Curve
    from desisky_tune.training.hyperparameters import StepSettings
    from desisky_tune.training.slots import SlotProgram, SlotSettings, SlotShape


@dataclass(frozen=True)
class Work:
    """A training to be taken to a number of epochs.

    Attributes
    ----------
    key
        Names the training.
    shape
        Of the program that trains it.
    state
        Where it stands, at its true width.
    step, huber_delta, fold
        Its settings.
    target
        Epochs in all.
    """

    key: Hashable
    shape: SlotShape
    state: Any
    step: StepSettings
    huber_delta: float
    fold: int
    target: int


@dataclass(frozen=True)
class Outcome:
    """What came of a `Work`.

    Attributes
    ----------
    words
        Where it stands now, on the device (`SlotProgram.state_of`).
    curves
        The epochs done, in pieces.
    seconds
        Its share of the device's time.
    """

    words: Any
    curves: list[Curve]
    seconds: float


@dataclass
class Group:
    """The works of one caller, who waits for all of them."""

    waiting: int
    done: threading.Event = field(default_factory=threading.Event)
    outcomes: dict[Hashable, Outcome] = field(default_factory=dict)
    error: Exception | None = None


@dataclass
class Seat:
    """A slot in use: by whom, and what its training is to do."""

    key: Hashable
    work: Work | None = None
    group: Group | None = None
    curves: list[Curve] = field(default_factory=list)
    seconds: float = 0.0


class Bank:
    """A program's states on the device, and who sits in its slots."""

    def __init__(self, program: SlotProgram, settings: SlotSettings) -> None:
        self.program = program
        self.states: Any = program.empty()
        self.settings = settings
        self.seats: list[Seat | None] = [None] * program.shape.slots
        self.arrivals: list[tuple[int, Any]] = []
        self.pace = 0.0
        self.bytes = program.bytes_per_slot() * program.shape.slots

    def free(self) -> int | None:
        """Return an empty slot, if there is one."""
        return next((slot for slot, seat in enumerate(self.seats) if seat is None), None)

    def idle(self) -> int | None:
        """Return a slot whose training has reached its goal and was not given another."""
        return next((s for s, seat in enumerate(self.seats) if seat and seat.work is None), None)

    def working(self) -> list[int]:
        """Return the slots that have something to do."""
        return [slot for slot, seat in enumerate(self.seats) if seat and seat.work]

    def leave(self, slot: int) -> None:
        """Empty a slot."""
        self.seats[slot] = None
        self.settings.target[slot] = 0
