"""Tells XLA's compilers what costs memory otherwise: README.md has the reasons."""
