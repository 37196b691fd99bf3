"""torchao's FP8 layer, made to compute the same in every mode."""

from typing import cast

import torch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear

_TOKENS = 16  # that stand in for none


class TorchAOLinear(Float8Linear):
    """torchao's ``Float8Linear`` with three cases that it fails in or gets wrong.

    * No tokens, as an expert without work has: the largest magnitude of nothing is an error there.
    * ``torch.inference_mode``: its tensors lack an operation that is asked of them in that mode alone.
    * A backward with ``create_graph=True``, as for a gradient penalty, would differentiate the rounding: an error here.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(input.clone())
        if not torch.compiler.is_compiling() and input.numel() == 0:
            zeros = input.new_zeros(_TOKENS, input.shape[-1])
            rows = torch.cat([input.reshape(-1, input.shape[-1]), zeros])
            return self.forward(rows)[:0].view(*input.shape[:-1], self.out_features)
        output = cast(Tensor, super().forward(input))
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(_refuse_double_backward)
        return output


def _refuse_double_backward(grad: Tensor) -> None:
    if torch.is_grad_enabled():  # in a backward, only under create_graph=True
        raise RuntimeError(
            "backward with create_graph=True through an FP8 layer would differentiate its rounding, whose derivative "
            "is 0: name the layers that a gradient penalty goes through in Float8Precision(exclude=[...])"
        )
