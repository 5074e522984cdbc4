"""Per-subject refinement: minutes on one subject, a small file that `generate` takes like any subject."""
