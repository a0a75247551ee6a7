"""The colours of figures: a variant has the same one in every figure.

Okabe and Ito's, told apart by colour-blind readers too.
"""

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
BLACK = "#000000"
GREY = "#888888"

# All others are vermilion: what is drawn with plain Flax, in a panel of its own.
_OF_VARIANTS = {"baseline": BLUE, "flax": BLUE, "lean": GREEN}


def of(variant: str) -> str:
    """The colour of a variant of training."""
    return _OF_VARIANTS.get(variant, VERMILION)
