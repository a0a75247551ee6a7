"""Writes figures to PNG files."""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from train.system.files import write_atomically


def save(figure: Figure, path: Path) -> None:
    """Writes a figure to a PNG file atomically, and closes the figure."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    write_atomically(path, image.getvalue())
