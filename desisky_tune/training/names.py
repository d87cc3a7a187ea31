"""Names that the training settings and the training core share."""

from __future__ import annotations

#: Losses that are known by name; ``native/training.c`` knows them by their position.
LOSSES: tuple[str, ...] = ("l2", "huber")

#: What a program may keep the best parameters by; likewise.
SELECTIONS: tuple[str, ...] = ("rmse", "loss")

#: How the learning rate may go.
SCHEDULES: tuple[str, ...] = ("constant", "cosine")
