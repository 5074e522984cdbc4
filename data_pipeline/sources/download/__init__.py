"""Fetching pictures by URL: img2dataset in an environment of its own, under our guard."""
