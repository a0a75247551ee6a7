"""The colours and markers of variants, the same in every figure."""

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

# Markers tell variants apart in print without colours.
_STYLES = {
    "flax": (BLUE, "o"),
    "exact": (GREY, "<"),
    "lean": (GREEN, "^"),
    "dropit_16": (VERMILION, "s"),
    "dropit_32": (ORANGE, "D"),
    "dropit_16384": (PURPLE, "v"),
    "remat_blocks": (SKY, "P"),
    "remat_dots": (BLACK, "X"),
}

COLOURS = {name: colour for name, (colour, _) in _STYLES.items()}
MARKERS = {name: marker for name, (_, marker) in _STYLES.items()}
