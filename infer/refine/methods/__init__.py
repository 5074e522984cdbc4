"""The methods by their names on the command line: module and object of each, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infer.refine.method import RefineMethod

METHODS = {
    "lasr": "infer.refine.methods.lasr",
    "textual-inversion": "infer.refine.methods.textual_inversion",
    "cross-init": "infer.refine.methods.cross_initialization",
    "custom-diffusion": "infer.refine.methods.custom_diffusion",
    "cross-init-custom-diffusion": "infer.refine.methods.cross_init_custom_diffusion",
    "dreambooth": "infer.refine.methods.dreambooth",
    "adapter": "infer.refine.methods.adapter",
    "lora": "infer.refine.methods.lora",
}


def load_method(name: str) -> RefineMethod:
    """The method of that name, one of `METHODS`."""
    method: RefineMethod = import_module(METHODS[name]).METHOD
    return method
