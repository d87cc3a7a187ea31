"""Where trials wait, at a rung, for what becomes of them (a part of the dispatcher)."""

from __future__ import annotations

import asyncio
from typing import Literal

Verdict = Literal["go", "stop", "rest"]

#: The trial goes on; it is over; the search ends, and the trial stays where it is.
GO: Verdict = "go"
STOP: Verdict = "stop"
REST: Verdict = "rest"


class Verdicts:
    """Verdicts that were given, and those who wait for one. For one event loop."""

    def __init__(self) -> None:
        self._going: dict[int, int] = {}
        self._stopped: set[int] = set()
        self._resting = False
        self._given = asyncio.Condition()

    async def judge(self, number: int, epochs: int, verdict: Verdict) -> None:
        """Say what becomes of trial `number` at so many epochs."""
        async with self._given:
            if verdict == STOP:
                self._stopped.add(number)
            else:
                self._going[number] = max(epochs, self._going.get(number, 0))
            self._given.notify_all()

    async def rest(self) -> None:
        """Let everybody who waits, now or later, stay where they are."""
        async with self._given:
            self._resting = True
            self._given.notify_all()

    async def verdict(self, number: int, epochs: int) -> Verdict:
        """Wait for the verdict on trial `number` at so many epochs."""
        async with self._given:
            while True:
                if number in self._stopped:
                    return STOP
                if self._going.get(number, 0) >= epochs:
                    return GO
                if self._resting:
                    return REST
                await self._given.wait()
