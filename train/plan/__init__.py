"""What a run would take, without running it: `train --dry-run`. Start with dry_run.py."""
