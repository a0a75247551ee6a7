"""Figures of training runs."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt

from train.files import write_atomically
from train.records import Row

# Okabe and Ito's colours, told apart by colour-blind readers too; a variant has the
# same one in every figure.
_COLOURS = {"flax": "#0072B2", "dropit": "#D55E00"}
_LABELS = {"flax": "Flax", "dropit": "DropIT"}


def curves(runs: dict[str, list[Row]], path: Path) -> None:
    """Draws loss and accuracy of several runs over their epochs into a PNG file.

    Args:
      runs: the rows of `metrics.csv` of each variant.
      path: where the figure goes.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for name, rows in runs.items():
            epochs = [row["epoch"] for row in rows]
            for part, style in (("train", ":"), ("test", "-")):
                axis.plot(
                    epochs,
                    [row[f"{part}_{metric}"] for row in rows],
                    style,
                    color=_COLOURS[name],
                    label=f"{_LABELS[name]}, {part}",
                )
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("accuracy")
    axes[1].set_ylim(0, 1)
    axes[1].legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, image.getvalue())
