"""`python infer/run.py …` is `subject-diffusion generate …`, for launchers that start a file."""

from data_pipeline.errors import run_command
from infer.generate import main

raise SystemExit(run_command(main))
