"""Configs: fields, defaults, variants."""
