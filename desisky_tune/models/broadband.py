"""The broadband model: observing conditions in, magnitudes in V, g, r, z out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from desisky_tune.errors import CheckpointError
from desisky_tune.models.raw_space import is_raw_space, mark_raw_space

#: Weights that desisky publishes, trained on the DESI DR1 sky-spectra VAC (0.27 MB).
PUBLISHED_URL = (
    "https://huggingface.co/datasets/mjdowicz/desisky/resolve/main/broadband_weights.eqx"
)
PUBLISHED_SHA256 = "ed355fd0577db3c022dd31ffa79acbca5774d558e19b2bdd6dee269af6394cf1"


def make_broadbandMLP(  # noqa: N802  (the reference package's name)
    *, in_size: int, out_size: int, width_size: int, depth: int, key: Any = None
) -> eqx.nn.MLP:
    """Build the broadband model: an MLP with ReLU and no final activation.

    Parameters
    ----------
    in_size
        Number of inputs; 6 for `desisky_tune.data.columns.FEATURES`.
    out_size
        Number of outputs; 4 for V, g, r, z.
    width_size
        Units of each hidden layer.
    depth
        Number of hidden layers; 0 gives a linear model.
    key
        JAX random key of the initial weights; `jax.random.PRNGKey(32)` by default.

    Returns
    -------
    equinox.nn.MLP
        Maps one input vector `(in_size,)` to `(out_size,)`; use `jax.vmap` for many.
    """
    if key is None:
        key = jax.random.PRNGKey(32)
    return eqx.nn.MLP(
        in_size=in_size, out_size=out_size, width_size=width_size, depth=depth, key=key
    )


def mlp_of_layers(layers: Sequence[tuple[Any, Any]]) -> eqx.nn.MLP:
    """Build the broadband model of given weights.

    Nothing is drawn, traced or compiled: Equinox's constructor takes a hundredth of a second for
    each new shape, even where the weights that it draws are not wanted.

    Parameters
    ----------
    layers
        Weight ``(out, in)`` and bias ``(out,)`` by layer, taken as they are: arrays of JAX or
        NumPy, or what stands for them (`jax.ShapeDtypeStruct`). No device is touched.

    Returns
    -------
    equinox.nn.MLP
        As from `make_broadbandMLP`; the width of one without a hidden layer is its outputs.
    """
    plain = _smallest_mlp()
    linears = tuple(
        _replaced(
            plain.layers[0],
            weight=weight,
            bias=bias,
            in_features=weight.shape[1],
            out_features=weight.shape[0],
        )
        for weight, bias in layers
    )
    return _replaced(
        plain,
        layers=linears,
        in_size=linears[0].in_features,
        out_size=linears[-1].out_features,
        width_size=linears[0].out_features,
        depth=len(linears) - 1,
    )


@lru_cache(maxsize=1)
def _smallest_mlp() -> eqx.nn.MLP:
    return eqx.filter_eval_shape(make_broadbandMLP, in_size=1, out_size=1, width_size=1, depth=1)


def _replaced(module: Any, **fields: Any) -> Any:
    """Return a module with other values in some fields, as Equinox itself rebuilds one."""
    rebuilt = object.__new__(type(module))
    for field in dataclasses.fields(module):
        value = fields[field.name] if field.name in fields else getattr(module, field.name)
        object.__setattr__(rebuilt, field.name, value)
    return rebuilt


def on_device(layers: Sequence[tuple[Any, Any]]) -> list[tuple[jax.Array, jax.Array]]:
    """Put the weights of layers on JAX's device; `jnp.asarray` compiles for each new shape."""
    return [(jax.device_put(weight), jax.device_put(bias)) for weight, bias in layers]


def permute_inputs(
    model: eqx.nn.MLP, names_from: Sequence[str], names_to: Sequence[str]
) -> eqx.nn.MLP:
    """Return the same model for inputs that come in another order.

    Parameters
    ----------
    model
        Takes its inputs in the order `names_from`.
    names_from, names_to
        The same names, in the present and in the wanted order.

    Returns
    -------
    equinox.nn.MLP
        Gives for inputs in the order `names_to` what `model` gives for `names_from`.

    Raises
    ------
    CheckpointError
        When the names are not the same, are repeated, or are not as many as the inputs.
    """
    have, want = list(names_from), list(names_to)
    unknown = [name for name in have if name not in want]
    missing = [name for name in want if name not in have]
    if unknown or missing:
        what = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise CheckpointError(
            f"cannot bring features {', '.join(have)} into the order {', '.join(want)}: {what}"
        )
    weight = model.layers[0].weight
    if len(set(have)) != len(have) or len(have) != len(want) or len(have) != weight.shape[1]:
        raise CheckpointError(
            f"features {', '.join(have)} do not name the {weight.shape[1]} inputs once each"
        )
    order = jnp.asarray([have.index(name) for name in want])
    permuted = eqx.tree_at(lambda mlp: mlp.layers[0].weight, model, weight[:, order])
    return mark_raw_space(permuted) if is_raw_space(model) else permuted
