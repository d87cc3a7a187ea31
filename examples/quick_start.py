"""Train the broadband model on the moonlit exposures of the sky-spectra VAC.

The catalogue (274 MiB) is fetched when it is not there; DESISKY_DATA_DIR says where. The best
model goes to ~/.cache/desisky/saved_models/broadband/my_broadband_model.eqx.

    python examples/quick_start.py
"""

import equinox as eqx
import jax

from desisky_tune.data import SkySpecVAC, make_split
from desisky_tune.training import (
    BroadbandTrainer,
    NumpyLoader,
    SkyBrightnessDataset,
    TrainingConfig,
)
from desisky_tune.visualization import plot_loss_curve

FEATURES = ["MOONSEP", "MOONFRAC", "MOONALT", "OBSALT", "TRANSPARENCY_GFA", "ECLIPSE_FRAC"]


def main() -> None:
    _, flux, meta = SkySpecVAC(download=True).load_moon_contaminated()
    split = make_split(meta, by="NIGHT", fractions=(0.7, 0.15, 0.15), seed=42)

    def loader(rows, *, shuffle):
        dataset = SkyBrightnessDataset(meta.iloc[rows], flux[rows], FEATURES)
        return NumpyLoader(dataset, batch_size=32, shuffle=shuffle)

    model = eqx.nn.MLP(in_size=6, out_size=4, width_size=128, depth=5, key=jax.random.PRNGKey(42))
    config = TrainingConfig(
        epochs=500,
        learning_rate=1e-4,
        loss="huber",
        huber_delta=0.25,
        run_name="my_broadband_model",
    )
    trainer = BroadbandTrainer(model, config)
    _, history = trainer.train(
        loader(split.train, shuffle=True), loader(split.validation, shuffle=False)
    )
    print(f"Best test loss: {history.best_test_loss:.4f} at epoch {history.best_epoch}")
    plot_loss_curve(history.train_losses, history.test_losses, save_path="loss-curve.png")


if __name__ == "__main__":
    main()
