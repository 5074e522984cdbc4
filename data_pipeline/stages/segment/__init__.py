"""Masks of the things that stand in boxes: SAM through two libraries, and GrabCut where there are no weights."""
