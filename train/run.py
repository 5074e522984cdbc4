"""`python train/run.py …` is `subject-diffusion train …`, for launchers that start a file."""

from data_pipeline.errors import run_command
from train.command import main

raise SystemExit(run_command(main))
