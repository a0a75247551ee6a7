"""Figures as files."""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from train.system.files import write_atomically


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, and lets go of the figure."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, image.getvalue())
