"""A look into a checkpoint's optimizer states, without the code of its model."""

from lightning_stosign.inspection.as_json import as_json
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.report import Report, inspect_checkpoint

__all__ = ["CheckpointError", "Report", "as_json", "inspect_checkpoint"]
