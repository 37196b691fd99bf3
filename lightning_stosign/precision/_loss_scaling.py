"""A loss scale for float16 weights: Lightning's mixed precision with a scaler that takes float16 gradients."""

import torch
from lightning.pytorch.plugins.precision.amp import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class LossScaling(MixedPrecision):
    """What Lightning does around a step with a ``GradScaler``, for a model whose weights are in float16.

    Args:
        model: The model.
        device: The type of the device that it is on.

    Raises:
        RuntimeError: The model is sharded.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise RuntimeError(
                "Float8Precision(weights_dtype='float16') does not run with sharded parameters: each rank would judge "
                "by its own shards whether a step is skipped. Use weights_dtype='bfloat16'"
            )
        super().__init__("16-mixed", device, scaler=_HalfGradScaler(device))


class _HalfGradScaler(torch.amp.GradScaler):
    """A GradScaler that unscales float16 gradients too, which torch's refuses: it expects float32 weights."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
