"""What of a Lightning training rules out that each parameter is updated in the middle of backward."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_stosign._lightning_names import is_a


def refuse_unless_releasable(trainer: Trainer, module: LightningModule) -> None:
    """Raise where gradients are needed after backward, or are not complete when a process's own backward has them.

    Raises:
        ValueError: it names what is in the way.
    """
    schedulers = [c for c in trainer.callbacks if is_a(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    obstacles = {
        f"accumulate_grad_batches={trainer.accumulate_grad_batches}": trainer.accumulate_grad_batches != 1,
        "GradientAccumulationScheduler": any(c.going_to_accumulate_grad_batches() for c in schedulers),
        f"gradient_clip_val={trainer.gradient_clip_val}": bool(trainer.gradient_clip_val),
        "configure_gradient_clipping of the module": not _is_lightning_s(module, "configure_gradient_clipping"),
        "a GradScaler (float16)": _scales_the_loss(trainer.precision_plugin),
        "manual optimization": not module.automatic_optimization,
        type(trainer.strategy).__name__: not is_a(trainer.strategy, SingleDeviceStrategy),
    }
    found = [name for name, is_there in obstacles.items() if is_there]
    if found:
        raise ValueError(
            f"release_gradients=True cannot run with {', '.join(found)}; accepted: one device, automatic optimization, "
            "one batch per step, neither clipping nor a GradScaler"
        )


def _scales_the_loss(plugin: object) -> bool:
    # That module imports Lightning, whose import loads this one.
    from lightning_stosign.precision.float8 import Float8Precision

    # Float8Precision makes its scaler at the first step.
    is_half = isinstance(plugin, Float8Precision) and plugin.weights_dtype is torch.float16
    return is_half or getattr(plugin, "scaler", None) is not None


def _is_lightning_s(module: LightningModule, method: str) -> bool:
    return getattr(type(module), method).__qualname__ == f"LightningModule.{method}"
