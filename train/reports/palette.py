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

_OF_VARIANTS = {"lean": GREEN}


def colour_of(variant: str, baseline: str) -> str:
    """Returns the colour of a variant: blue for the baseline, else green or vermilion.

    A variant shares a panel with the baseline alone, so others may be equal in colour.
    """
    return BLUE if variant == baseline else _OF_VARIANTS.get(variant, VERMILION)
