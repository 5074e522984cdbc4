"""Parameter-efficient adapters of a stock UNet: read at one position, add at another (arXiv 2303.18181)."""

from model.efficient_adapters.adapters import EfficientAdapters
from model.efficient_adapters.attachment import attach, detach
from model.efficient_adapters.design import AdapterDesign, AdapterError
from model.efficient_adapters.folder import load_folder, save_folder

__all__ = ["AdapterDesign", "AdapterError", "EfficientAdapters", "attach", "detach", "load_folder", "save_folder"]
