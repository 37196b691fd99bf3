"""A look into a Lightning checkpoint's optimizer states, without the code of its model."""

from lightning_stosign.inspection.checkpoint import CheckpointError
from lightning_stosign.inspection.report import Report, as_json, inspect_checkpoint

__all__ = ["CheckpointError", "Report", "as_json", "inspect_checkpoint"]
