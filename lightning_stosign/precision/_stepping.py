"""What happens around backward and a step: what Lightning itself does there, under the Trainer and under Fabric."""

from typing import Any

import torch
from lightning.fabric.plugins.precision.amp import MixedPrecision as FabricMixedPrecision
from lightning.fabric.plugins.precision.precision import Precision as FabricPrecision
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision.amp import MixedPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_stosign._lightning_names import is_a, like


class Stepping:
    """Runs backward and steps as Lightning's own precision plugins do, with a loss scale where the weights are float16.

    The plugin is that of whoever trains: Fabric's, or the Trainer's under the name of Lightning that the module belongs
    to. The Trainer's own calls the hooks of callbacks and of the module, and clips gradients, for a module of its name
    only.

    Attributes:
        scaler: The loss scale, or None.
    """

    def __init__(self) -> None:
        self.scaler: torch.amp.GradScaler | None = None
        self._device = "cpu"

    def scale_loss(self, model: nn.Module, device: str) -> None:
        """Scale the loss from now on: the weights are float16.

        Args:
            model: The model.
            device: The type of the device that it is on.

        Raises:
            RuntimeError: The model is sharded.
        """
        if self.scaler is not None:
            return
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise RuntimeError(
                "Float8Precision(weights_dtype='float16') does not run with sharded parameters: each rank would judge "
                "by its own shards whether a step is skipped. Use weights_dtype='bfloat16'"
            )
        self.scaler, self._device = HalfGradScaler(device), device

    def under(self, model: nn.Module | None) -> Any:
        """Return Lightning's plugin for the steps of a model; under Fabric there may be none to name."""
        trainer = model is not None and is_a(model, LightningModule) and model.fabric is None
        if self.scaler is None:
            return like(model, Precision)() if trainer else FabricPrecision()
        mixed = like(model, MixedPrecision) if trainer else FabricMixedPrecision
        return mixed("16-mixed", self._device, scaler=self.scaler)


class HalfGradScaler(torch.amp.GradScaler):
    """A GradScaler that unscales float16 gradients too, which torch's refuses: it expects float32 weights."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
