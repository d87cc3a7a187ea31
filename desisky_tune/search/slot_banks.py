"""The slots of a device, and the one thread that runs them.

A *bank* is a program of `desisky_tune.training.slots` with its states on the device. Trainings of
one shape fill the slots of its banks; where none is free another bank of the same program is
opened, so that the shape of a training never depends on how many others there are. The thread goes
round the banks in which something is to be done and advances each by some epochs, while the
callers of those that are at their goal collect what came of it. A training keeps its slot between
its goals, until somebody else needs it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from desisky_tune.errors import DesiskyTuneError
from desisky_tune.search.figures import Meter
from desisky_tune.search.slot_bank import Bank, Group, Outcome, Seat, Work

if TYPE_CHECKING:
    from desisky_tune.training.slot_rows import SlotRows
    from desisky_tune.training.slots import SlotProgram, SlotShape

#: Seconds that a chunk may last: a training that comes in meanwhile waits for so long.
LONGEST_CHUNK = 1.0

#: Seconds for which a training at its goal may wait, so that not every chunk is one epoch long.
SHORTEST_CHUNK = 0.05


class OutOfDeviceMemoryError(DesiskyTuneError):
    """A training does not fit the device's memory."""


class SlotBanks:
    """Trains on one device whatever any thread brings.

    Parameters
    ----------
    rows
        On the device.
    memory
        Bytes that banks may take together; by default a share of what the device has.

    Attributes
    ----------
    meter
        How long was compiled, by all callers together, and how long the device trained.
    """

    def __init__(self, rows: SlotRows, memory: int | None = None) -> None:
        from desisky_tune.training.slot_count import MEMORY_SHARE, device_memory

        self._rows = rows
        self._memory = int(MEMORY_SHARE * device_memory()) if memory is None else memory
        self._banks: dict[SlotShape, list[Bank]] = {}
        self._places: dict[Hashable, tuple[Bank, int]] = {}
        self._programs: dict[SlotShape, SlotProgram] = {}
        self._opening: dict[SlotShape, threading.Lock] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._epochs = 0
        self.meter = Meter()

    def train(self, works: Sequence[Work]) -> dict[Hashable, Outcome]:
        """Take trainings to their goals, or until they fail; return when all are there.

        Raises
        ------
        OutOfDeviceMemoryError
            When the device has no room for them, even by itself.
        DesiskyTuneError
            When this was closed meanwhile.
        """
        try:
            return self._train(works)
        except OutOfDeviceMemoryError:
            # Whose fault it was cannot be told: those that fit go on from where they were.
            return self._train(works)

    def _train(self, works: Sequence[Work]) -> dict[Hashable, Outcome]:
        group = Group(len(works))
        try:
            for work in works:
                self._compile(work.shape)
                self._seat(work, group)
        except BaseException:
            with self._changed:
                self._give_up(group)
            raise
        group.done.wait()
        if group.error is not None:
            raise group.error
        return group.outcomes

    def leave(self, key: Hashable) -> None:
        """Empty the slot of a training that will not go on."""
        with self._changed:
            if key in self._places:
                bank, slot = self._places.pop(key)
                bank.leave(slot)
                self._changed.notify_all()

    def figures(self) -> dict[str, int]:
        """Return slots in all and busy, programs compiled, and epochs of all trainings."""
        with self._changed:
            banks = [bank for kind in self._banks.values() for bank in kind]
            return {
                "slots": sum(len(bank.seats) for bank in banks),
                "slots_busy": sum(len(bank.working()) for bank in banks),
                "programs": len(self._programs),
                "epochs": self._epochs,
            }

    def close(self) -> None:
        """End the thread; whoever still waits gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------------ by the callers' threads

    def _compile(self, shape: SlotShape) -> None:
        """Make a shape's program: in the caller's thread, while others are trained."""
        from desisky_tune.training.slots import slot_program

        with self._changed:
            if shape in self._programs:
                return
            lock = self._opening.setdefault(shape, threading.Lock())
        with lock:
            if shape in self._programs:
                return
            program = slot_program(shape)

            def compile_it() -> None:
                with self.meter.spending("compiling"):
                    program.compile(self._rows)

            while not self._found_room(shape, compile_it):
                pass
            with self._changed:
                self._programs[shape] = program

    def _open(self, shape: SlotShape) -> None:
        """Open another bank, unless somebody else just has."""
        from desisky_tune.training.slots import SlotSettings

        def open_one() -> None:
            bank = Bank(self._programs[shape], SlotSettings.empty(shape.slots))
            with self._changed:
                self._banks.setdefault(shape, []).append(bank)

        with self._opening[shape]:
            with self._changed:
                if any(bank.free() is not None for bank in self._banks.get(shape, ())):
                    return
            self._found_room(shape, open_one)

    def _found_room(self, shape: SlotShape, action: Callable[[], None]) -> bool:
        """Do what needs memory; False when there was none, and somebody has left since."""
        from desisky_tune.training.slot_count import footprint

        with self._changed:
            held = sum(bank.bytes for kind in self._banks.values() for bank in kind)
        needed = footprint(shape, self._rows)
        reason: str | Exception = (
            f"they need about {needed / 2**30:.2f} GiB of {self._memory / 2**30:.2f}"
        )
        if held + needed <= self._memory:
            try:
                action()
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                reason = error
            else:
                return True
        with self._changed:
            if self._drop_idle():
                return False
            if self._busy():
                self._changed.wait()
                return False
        raise _no_room(shape, reason)

    def _drop_idle(self) -> bool:
        """Close the banks in which nothing is to be done: their trainings come back when needed."""
        idle = [b for kind in self._banks.values() for b in kind if not b.working()]
        for bank in idle:
            self._close_bank(bank)
        return bool(idle)

    def _close_bank(self, bank: Bank) -> None:
        kind = self._banks[bank.program.shape]
        if bank in kind:
            kind.remove(bank)
        bank.states = None
        for key in [key for key, place in self._places.items() if place[0] is bank]:
            del self._places[key]

    def _seat(self, work: Work, group: Group) -> None:
        """Give a training its slot, or one, and its goal."""
        arriving = None
        while True:
            with self._changed:
                if self._closed:
                    raise DesiskyTuneError("the slots of this device are closed")
                if group.done.is_set():
                    return  # its bank was lost with another training of this caller
                place = self._places.get(work.key)
                if place is None and arriving is not None:
                    place = self._place(work.shape)
                if place is not None:
                    self._start(work, group, *place, arriving)
                    return
            if arriving is None:
                arriving = self._programs[work.shape].words(work.state)
            else:
                self._open(work.shape)

    def _place(self, shape: SlotShape) -> tuple[Bank, int] | None:
        """Return an empty slot, or one whose training has nothing to do."""
        banks = self._banks.get(shape, ())
        for bank in banks:
            if (slot := bank.free()) is not None:
                return bank, slot
        for bank in banks:
            if (slot := bank.idle()) is not None:
                seat = bank.seats[slot]
                assert seat is not None
                self._places.pop(seat.key, None)
                bank.leave(slot)
                return bank, slot
        return None

    def _start(self, work: Work, group: Group, bank: Bank, slot: int, arriving: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="slots", daemon=True)
            self._thread.start()
        if work.key not in self._places:
            bank.arrivals.append((slot, arriving))
            self._places[work.key] = bank, slot
        bank.seats[slot] = Seat(work.key, work, group)
        bank.settings.fill(slot, work.step, work.huber_delta, fold=work.fold, target=work.target)
        self._changed.notify_all()

    # ------------------------------------------------------------------ by the one thread

    def _run(self) -> None:
        turn = 0
        while True:
            with self._changed:
                while not (busy := self._busy()) and not self._closed:
                    self._changed.wait()
                if self._closed:
                    self._end(DesiskyTuneError("the slots of this device were closed"))
                    return
            bank = busy[turn % len(busy)]
            turn += 1
            try:
                self._advance(bank)
            except Exception as error:
                self._lose(bank, error)

    def _busy(self) -> list[Bank]:
        return [bank for kind in self._banks.values() for bank in kind if bank.working()]

    def _advance(self, bank: Bank) -> None:
        """Advance a bank by a chunk, and tell those that are at their goal."""
        with self._changed:
            arrivals, bank.arrivals = bank.arrivals, []
            settings = type(bank.settings)(*(part.copy() for part in bank.settings))
            seats = {slot: bank.seats[slot] for slot in bank.working()}
            epochs = self._chunk(bank, seats)
        began = time.perf_counter()
        for slot, words in arrivals:
            bank.states = bank.program.put(bank.states, slot, words)
        bank.states, curves = bank.program.advance(bank.states, self._rows, settings, epochs)
        seconds = time.perf_counter() - began
        made = int(curves.done.max())
        if made:
            bank.pace = seconds / made
        ended = {}
        for slot, seat in seats.items():
            assert seat is not None
            curve = curves.of(slot)
            seat.curves.append(curve)
            seat.seconds += seconds / len(seats)
            if curve.failed or self._epochs_of(seat) >= self._goal(seat):
                ended[slot] = bank.program.take(bank.states, slot)
        with self._changed:
            self.meter.add("training", seconds)
            self._epochs += int(curves.done.sum())
            for slot, words in ended.items():
                self._deliver(bank, slot, seats[slot], words)
            self._changed.notify_all()

    def _chunk(self, bank: Bank, seats: dict[int, Seat | None]) -> int:
        """Return the epochs to advance: to the nearest goal, but neither too few nor too many."""
        from desisky_tune.training.slots import CAPACITY

        left = min(self._goal(seat) - self._epochs_of(seat) for seat in seats.values() if seat)
        if not bank.pace:
            return 1
        least = int(SHORTEST_CHUNK / bank.pace)
        most = int(LONGEST_CHUNK / bank.pace)
        return max(1, min(max(left, least), most, CAPACITY))

    @staticmethod
    def _epochs_of(seat: Seat) -> int:
        assert seat.work is not None
        return int(seat.work.state.epoch) + sum(map(len, seat.curves))

    @staticmethod
    def _goal(seat: Seat) -> int:
        assert seat.work is not None
        return seat.work.target

    def _deliver(self, bank: Bank, slot: int, seat: Seat | None, words: Any) -> None:
        if seat is None or seat.group is None or bank.seats[slot] is not seat:
            return  # given up, or left, while the chunk ran
        group = seat.group
        group.outcomes[seat.key] = Outcome(words, seat.curves, seat.seconds)
        group.waiting -= 1
        bank.seats[slot] = Seat(seat.key)
        if group.waiting == 0:
            group.done.set()

    def _give_up(self, group: Group) -> None:
        """Empty the slots of a caller's other trainings."""
        for kind in self._banks.values():
            for bank in kind:
                for slot in bank.working():
                    seat = bank.seats[slot]
                    if seat is not None and seat.group is group:
                        self._places.pop(seat.key, None)
                        bank.leave(slot)
        group.waiting = 0
        group.done.set()
        self._changed.notify_all()

    def _lose(self, bank: Bank, error: Exception) -> None:
        """Tell those in a bank whose states are lost, and open it no more."""
        if _is_out_of_memory(error):
            error = _no_room(bank.program.shape, error)
        with self._changed:
            self._close_bank(bank)
            for seat in bank.seats:
                if seat is not None and seat.group is not None:
                    seat.group.error = error
                    self._give_up(seat.group)
            self._changed.notify_all()

    def _end(self, error: Exception) -> None:
        for bank in self._busy():
            for slot in bank.working():
                seat = bank.seats[slot]
                if seat is not None and seat.group is not None:
                    seat.group.error = error
                    self._give_up(seat.group)


def _no_room(shape: SlotShape, reason: object) -> OutOfDeviceMemoryError:
    return OutOfDeviceMemoryError(
        f"{shape.slots} slots of depth {shape.depth} and width {shape.width} do not fit the"
        f" device's memory: {str(reason).splitlines()[0]}"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether JAX says that the device has no memory left: it has no class for that."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
