"""What a training is told without a compile, and what follows from it for a single step.

The learning rate, and beside it what is off unless it is given: a schedule (linear warm-up, cosine
decay), weight decay, and gradient clipping. All of them are optax's, step for step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from desisky_tune.errors import InputError
from desisky_tune.training.names import SCHEDULES


@dataclass(frozen=True)
class Hyperparameters:
    """What may change without a compile.

    Attributes
    ----------
    learning_rate
        Step size of Adam (an optimizer of your own ignores it); the highest of a schedule.
    huber_delta
        Residual (mag) at which the Huber loss turns linear; the L2 loss ignores it.
    schedule
        "constant", or "cosine": the rate falls along half a cosine to its last value.
    warmup
        Share of all steps, from 0 to below 1, over which the rate first rises linearly from 0.
    final_rate
        Where "cosine" ends, as a share of `learning_rate`, 0 to 1.
    weight_decay
        Of AdamW: each step takes `weight_decay` times the step's rate off every weight and bias.
    gradient_clip
        Longest gradient, by the Euclidean norm over all weights and biases; 0 for any length.
    epochs
        Epochs that the schedule spans: those of the whole training, whatever pieces it is done in.
        0 where there is no schedule.

    Raises
    ------
    InputError
        When a value is out of its range, or a schedule has no epochs to span.
    """

    learning_rate: float
    huber_delta: float = 1.0
    schedule: str = "constant"
    warmup: float = 0.0
    final_rate: float = 0.0
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    epochs: int = 0

    def __post_init__(self) -> None:
        rules = {
            "schedule": (self.schedule in SCHEDULES, f"one of {SCHEDULES}"),
            "warmup": (0 <= self.warmup < 1, "from 0 to below 1"),
            "final_rate": (0 <= self.final_rate <= 1, "from 0 to 1"),
            "weight_decay": (_at_least_zero(self.weight_decay), "a number of at least 0"),
            "gradient_clip": (_at_least_zero(self.gradient_clip), "a number of at least 0"),
            "epochs": (self.epochs >= (1 if self.scheduled else 0), "at least 1 with a schedule"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                given = getattr(self, name)
                raise InputError(f"Hyperparameters: {name} is {given!r}; it must be {rule}")

    @property
    def scheduled(self) -> bool:
        """Whether the rate changes from step to step."""
        return self.schedule != "constant" or self.warmup > 0

    @property
    def extended(self) -> bool:
        """Whether anything beside plain Adam at one rate is asked for."""
        return self.scheduled or self.weight_decay > 0 or self.gradient_clip > 0

    def steps(self, per_epoch: int) -> StepSettings:
        """Return what each step needs to know, where an epoch has `per_epoch` of them."""
        total = self.epochs * per_epoch
        warmup = min(round(self.warmup * total), max(total - 1, 0))
        return StepSettings(
            learning_rate=np.float32(self.learning_rate),
            warmup_steps=np.int32(warmup),
            decay_steps=np.int32(total - warmup if self.schedule == "cosine" else 0),
            final_rate=np.float32(self.final_rate),
            weight_decay=np.float32(self.weight_decay),
            gradient_clip=np.float32(self.gradient_clip),
        )


class StepSettings(NamedTuple):
    """`Hyperparameters` as a step takes them: scalars, or arrays with an entry per training.

    Attributes
    ----------
    learning_rate
        The highest rate.
    warmup_steps, decay_steps
        Steps in which it rises, and then falls; 0 decay steps leave it where it is.
    final_rate
        Share of the rate at the end of the fall.
    weight_decay, gradient_clip
        As in `Hyperparameters`.
    """

    learning_rate: Any
    warmup_steps: Any
    decay_steps: Any
    final_rate: Any
    weight_decay: Any
    gradient_clip: Any


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the steps of an epoch, the short one at its end included unless it is dropped."""
    return rows // batch_size if drop_last else -(-rows // batch_size)


def rate_at(settings: StepSettings, step: jax.Array) -> jax.Array:
    """Return the learning rate of a step, counted from 0.

    `optax.warmup_cosine_decay_schedule` from 0 on; Loshchilov & Hutter 2017 (SGDR), eq. 5.
    """
    at = step.astype(jnp.float32)
    warmup, decay = (
        jnp.asarray(count, jnp.float32) for count in (settings.warmup_steps, settings.decay_steps)
    )
    way = jnp.clip((at - warmup) / jnp.maximum(decay, 1), 0, 1)
    fallen = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + jnp.cos(jnp.pi * way))
    share = jnp.where(at < warmup, at / jnp.maximum(warmup, 1), jnp.where(decay > 0, fallen, 1))
    return settings.learning_rate * share


def clip_factor(squares: jax.Array, longest: Any) -> jax.Array:
    """Return what a gradient is multiplied by, so that it is no longer than `longest`.

    Parameters
    ----------
    squares
        Sum of its squares.
    longest
        Its longest Euclidean norm (`optax.clip_by_global_norm`; Pascanu et al. 2013, algorithm
        1); 0 for any.
    """
    norm = jnp.sqrt(squares)
    return jnp.where((longest <= 0) | (norm < longest), 1, longest / norm)


def _at_least_zero(value: float) -> bool:
    return math.isfinite(value) and value >= 0
