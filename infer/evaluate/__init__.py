"""Measuring pictures against the truth of the toybox: judges, protocol, scores."""
