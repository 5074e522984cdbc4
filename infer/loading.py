"""From a name to the parts of a pipeline: a shipped model (`toybox`), a saved folder, or a hub id.

Three layouts are understood: a folder of trained parts over a base (`subject_model.json`), a full diffusers folder with
`adapter/` and `image_encoder/` beside the stock parts, and either of them on the hub. Weights are read from safetensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from transformers import CLIPTextModel, CLIPTokenizer

from data_pipeline.errors import UserError

SHIPPED = Path(__file__).resolve().parent.parent / "model" / "weights"  # NAME/base and NAME/subject below it
TRAINED_PARTS = "subject_model.json"
