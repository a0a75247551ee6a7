"""The forms that values are stored in, and the presets that choose among them."""
