"""Adapters as a folder with one file each, BLOCK.INPUT-OUTPUT.safetensors, as the published code lays them out.

The published files are pickled and hold no design; these are safetensors and say in their header what they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from diffusers.models import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.efficient_adapters.adapters import EfficientAdapters
from model.efficient_adapters.design import AdapterDesign, AdapterError

SUFFIX = ".safetensors"
DESIGN = "adapter_design"  # key of the header


def save_folder(adapters: EfficientAdapters, folder: Path) -> list[Path]:
    """Write one file an adapter.

    Args:
        folder: made when missing; without adapters of an earlier save.
    Returns:
        The files.
    Raises:
        AdapterError: it cannot be written, or other files would be taken for adapters.
    """
    if folder.is_dir() and any(folder.glob(f"*{SUFFIX}")):
        raise AdapterError(f"adapters {folder}: holds {SUFFIX} files already; give a folder without")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for placed in adapters:
            values = {key: value.detach().cpu().contiguous() for key, value in placed.module.state_dict().items()}
            path = folder / f"{placed.name}{SUFFIX}"
            save_file(values, path, metadata={DESIGN: json.dumps(asdict(placed.design))})
            written.append(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise AdapterError(f"adapters {folder}: cannot be written ({reason}); give another folder") from error
    return written


def load_folder(unet: UNet2DConditionModel, folder: Path) -> EfficientAdapters:
    """The adapters of a folder, for this UNet; not attached yet.

    Raises:
        AdapterError: no adapters there, a damaged file, or adapters of another base.
    """
    files = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    if not files:
        raise AdapterError(f"adapters {folder}: no adapter files there; give a folder that was saved with them")
    designs: dict[str, AdapterDesign] = {}
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                design = AdapterDesign(**json.loads((handle.metadata() or {})[DESIGN]))
                tensors |= {f"{file.stem}.{key}": handle.get_tensor(key) for key in handle.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise AdapterError(f"adapter {file}: cannot be read ({reason}); it is damaged or no adapter") from error
        designs[design.label] = design
    adapters = EfficientAdapters(unet, list(designs.values()))
    adapters.load_tensors(tensors)
    return adapters
