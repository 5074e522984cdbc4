"""What GPUs can do and hold, by their makers' papers; for the dry run's estimates and the share of the peak reached.

Dense products, accumulated in float32: data sheets quote twice as much for sparse ones, and the Ada and Ampere consumer
papers twice as much for accumulation in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import UserError

Precision = Literal["no", "bf16", "fp16"]
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: float  # as its driver reports it
    peak_half: float  # TFLOP/s in bfloat16 and float16
    peak_tf32: float  # TFLOP/s of float32 products on tensor cores
    peak_float32: float  # TFLOP/s in float32
    source: str

    def peak_flops(self, precision: Precision, tf32: bool) -> float:
        """FLOP/s of the matrix products of a run."""
        if precision != "no":
            return self.peak_half * 1e12
        return (self.peak_tf32 if tf32 else self.peak_float32) * 1e12


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 79.3, 312.0, 156.0, 19.5, "NVIDIA A100 data sheet, 2022"),
    "a100-40gb": Gpu("A100 SXM 40 GB", 39.4, 312.0, 156.0, 19.5, "NVIDIA A100 data sheet, 2022"),
    "h100": Gpu("H100 SXM 80 GB", 79.6, 989.4, 494.7, 66.9, "NVIDIA H100 architecture paper, 2022, table 2"),
    "h200": Gpu("H200 SXM 141 GB", 139.8, 989.4, 494.7, 66.9, "NVIDIA H200 data sheet, 2024"),
    "l40s": Gpu("L40S 48 GB", 44.5, 362.0, 183.0, 91.6, "NVIDIA L40S data sheet, 2023"),
    "rtx4090": Gpu("RTX 4090 24 GB", 23.5, 165.2, 82.6, 82.6, "NVIDIA Ada architecture paper, 2022, appendix A"),
    "rtx3090": Gpu("RTX 3090 24 GB", 23.6, 71.0, 35.6, 35.6, "NVIDIA GA102 architecture paper, 2020, appendix A"),
}
MEMORY_SIZES = {"24 GB": 23.5, "40 GB": 39.4, "80 GB": 79.2, "141 GB": 139.8}  # label -> GiB


def find_gpu(name: str) -> Gpu:
    """The GPU of that name: `h100`, `RTX 4090`, or what the driver calls it, "NVIDIA H100 80GB HBM3".

    Raises:
        UserError: none of that name.
    """
    plain = name.lower().replace(" ", "").removeprefix("nvidia").removeprefix("geforce").strip("-")
    if "a100" in plain and "40gb" in plain:
        return GPUS["a100-40gb"]
    for key, gpu in sorted(GPUS.items(), key=lambda item: -len(item[0])):
        if plain.startswith(key):
            return gpu
    raise UserError(f"--gpu {name}: unknown; expected one of {', '.join(GPUS)}")
