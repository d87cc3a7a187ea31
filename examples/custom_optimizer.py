"""Train with an optimizer of one's own: AdamW with clipped gradients and a cosine schedule.

Runs on the real exposures that ship with the package.

    python examples/custom_optimizer.py
"""

import equinox as eqx
import jax
import optax

from desisky_tune.data import FEATURES, load_features, make_split
from desisky_tune.training import (
    BroadbandTrainer,
    NumpyLoader,
    SkyBrightnessDataset,
    TrainingConfig,
)


def make_optimizer(epochs, steps_per_epoch):
    schedule = optax.cosine_decay_schedule(1e-3, decay_steps=epochs * steps_per_epoch)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))


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
        loss="huber",
        huber_delta=0.25,
        run_name="custom_optimizer",
        standardize=True,
    )
    optimizer = make_optimizer(config.epochs, steps_per_epoch=-(-len(split.train) // 32))
    trainer = BroadbandTrainer(model, config, optimizer=optimizer)
    _, history = trainer.train(
        loader(split.train, shuffle=True), loader(split.validation, shuffle=False)
    )
    print(f"Best test loss: {history.best_test_loss:.4f} at epoch {history.best_epoch}")


if __name__ == "__main__":
    main()
