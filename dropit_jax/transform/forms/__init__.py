"""The forms in which values are stored, and the presets that choose among them."""
