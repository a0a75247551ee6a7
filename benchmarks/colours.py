"""The colours of figures: a variant has the same one in every figure."""

from train.reports.palette import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
)

_YELLOW = "#F0E442"  # the last of Okabe and Ito's

# And markers, told apart in print without colours.
_STYLES = {
    "flax": (BLUE, "o"),
    "drop exact": (GREY, "<"),
    "drop lean": (_YELLOW, ">"),
    "dropit_16": (VERMILION, "s"),
    "lean": (GREEN, "^"),
    "dropit_32": (ORANGE, "D"),
    "dropit_16384": (PURPLE, "v"),
    "remat_blocks": (SKY, "P"),
    "remat_dots": (BLACK, "X"),
}

COLOURS = {name: colour for name, (colour, _) in _STYLES.items()}
MARKERS = {name: marker for name, (_, marker) in _STYLES.items()}
