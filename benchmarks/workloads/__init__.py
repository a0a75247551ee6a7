"""The training steps that are measured: models, arguments and variants."""
