"""`python data_pipeline/run.py …` is `subject-diffusion data …`, for launchers that start a file."""

from data_pipeline.command import main
from data_pipeline.errors import run_command

if __name__ == "__main__":  # worker processes import this file again
    raise SystemExit(run_command(main))
