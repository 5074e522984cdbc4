"""Backends that find the noun phrases of a caption."""
