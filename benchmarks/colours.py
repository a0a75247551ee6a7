"""The colours of figures: a variant has the same one in every figure."""

from train.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

# And markers, told apart in print without colours.
_STYLES = {
    "flax": (BLUE, "o"),
    "dropit_16": (VERMILION, "s"),
    "lean": (GREEN, "^"),
    "dropit_32": (ORANGE, "D"),
    "dropit_16384": (PURPLE, "v"),
    "remat_blocks": (SKY, "P"),
    "remat_dots": (BLACK, "X"),
}

COLOURS = {name: colour for name, (colour, _) in _STYLES.items()}
MARKERS = {name: marker for name, (_, marker) in _STYLES.items()}
