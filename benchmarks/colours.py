"""The colours of figures: a variant has the same one in every figure."""

# Okabe and Ito's colours, told apart by colour-blind readers too, and markers, told
# apart in print without colours.
_STYLES = {
    "flax": ("#0072B2", "o"),
    "dropit_16": ("#D55E00", "s"),
    "lean": ("#009E73", "^"),
    "dropit_32": ("#E69F00", "D"),
    "dropit_16384": ("#CC79A7", "v"),
    "remat_blocks": ("#56B4E9", "P"),
    "remat_dots": ("#000000", "X"),
}

COLOURS = {name: colour for name, (colour, _) in _STYLES.items()}
MARKERS = {name: marker for name, (_, marker) in _STYLES.items()}
