"""Configs: their fields, defaults, checks and variants."""
