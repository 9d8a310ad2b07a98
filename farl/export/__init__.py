"""Weights in the layouts of other libraries: ``python -m farl.export CHECKPOINT OUT --format FORMAT``."""

from farl.export.files import export_model
from farl.export.layouts import FORMATS, export_state_dict

__all__ = ["FORMATS", "export_model", "export_state_dict"]
