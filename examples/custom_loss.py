"""Train with a loss of one's own: the logarithm of the hyperbolic cosine of the residual.

It is smooth, quadratic near zero and linear far away. Runs on the real exposures that ship with
the package.

    python examples/custom_loss.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from desisky_tune.data import FEATURES, load_features, make_split
from desisky_tune.training import (
    BroadbandTrainer,
    NumpyLoader,
    SkyBrightnessDataset,
    TrainingConfig,
)


def log_cosh(pred, targets):
    """Mean of log(cosh(residual)), written so that no large residual overflows."""
    size = jnp.abs(pred - targets)
    return jnp.mean(size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(2.0))


def main() -> None:
    frame = load_features("sv1").frame
    split = make_split(frame, by="NIGHT", seed=0)

    def loader(rows, *, shuffle):
        dataset = SkyBrightnessDataset(frame.iloc[rows], None, FEATURES)  # it has no spectra
        return NumpyLoader(dataset, batch_size=32, shuffle=shuffle)

    model = eqx.nn.MLP(in_size=6, out_size=4, width_size=64, depth=3, key=jax.random.PRNGKey(0))
    config = TrainingConfig(
        epochs=200,
        learning_rate=1e-3,
        loss=log_cosh,
        run_name="custom_loss",
        standardize=True,
    )
    trainer = BroadbandTrainer(model, config)
    _, history = trainer.train(
        loader(split.train, shuffle=True), loader(split.validation, shuffle=False)
    )
    print(f"Best test loss: {history.best_test_loss:.4f} at epoch {history.best_epoch}")


if __name__ == "__main__":
    main()
