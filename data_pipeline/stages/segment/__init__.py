"""Masks of the things that stand in boxes, and the run lengths by which records hold them."""
