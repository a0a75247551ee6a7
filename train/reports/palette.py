"""Colours of figures; a variant has the same colour in all of them.

They are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
BLACK = "#000000"
GREY = "#888888"

# All others are vermilion: each shares a panel only with a variant of plain Flax.
_OF_VARIANTS = {"baseline": BLUE, "flax": BLUE, "lean": GREEN}


def colour_of(variant: str) -> str:
    """Returns the colour of a variant of training."""
    return _OF_VARIANTS.get(variant, VERMILION)
