"""The FP8 precision plugin for the Lightning Trainer."""

from lightning_stosign.precision.float8 import Float8Precision

__all__ = ["Float8Precision"]
