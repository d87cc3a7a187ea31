"""Load a checkpoint, look at its header, and set it beside the classical model.

Takes the file of examples/quick_start.py, or the one that is named. Measures on the real
exposures that ship with the package.

    python examples/load_model.py [CHECKPOINT]
"""

import sys

from desisky_tune.data import load_features, make_split
from desisky_tune.inference import evaluate
from desisky_tune.io import feature_names, get_user_model_dir, load_model


def main(arguments: list[str]) -> None:
    default = get_user_model_dir("broadband") / "my_broadband_model.eqx"
    path = arguments[0] if arguments else default

    model, meta = load_model("broadband", path=path)
    print(f"{path}: {model.in_size} inputs, {model.width_size} x {model.depth}")
    print(f"Inputs: {', '.join(feature_names(meta))}")
    print(
        f"Best at epoch {meta['training']['epoch']}, test loss {meta['training']['test_loss']:.4f}"
    )

    table = load_features("sv1")
    split = make_split(table.frame, by="NIGHT", seed=0)
    evaluation = evaluate(path, table, split.test, train_rows=split.train)
    print(f"{'model':>10}  {'band':<11}  {'RMSE':>6}  {'bias':>6}  {'NMAD':>6}  {'> 0.4':>6}")
    for row in evaluation.table_rows():
        if "bias" in row:
            numbers = (row["rmse"], row["bias"], row["nmad"], row["outlier_fraction"])
            shown = "  ".join(f"{number:6.3f}" for number in numbers)
        else:
            shown = f"{row['rmse']:6.3f}"
        print(f"{row['model']:>10}  {row['band']:<11}  {shown}")
    for note in evaluation.notes:
        print("note:", note)


if __name__ == "__main__":
    main(sys.argv[1:])
