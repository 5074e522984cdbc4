"""What is added to a stock UNet and text encoder; `adapter.py` is the model, the other files are its parts."""

from model.subject_adapter.adapter import SubjectAdapter
from model.subject_adapter.condition import SubjectCondition

__all__ = ["SubjectAdapter", "SubjectCondition"]
