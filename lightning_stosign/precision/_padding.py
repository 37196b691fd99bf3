"""Linear layers of any size on hardware that wants multiples: zeros fill up what is missing."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from lightning_stosign.precision._layers import HollowLayer


class PaddedLinear(HollowLayer):
    """A linear layer that computes as a larger one whose additional weights are zero.

    The parameters keep their own sizes, names and values; zeros are added for each call. They change no output and no
    largest magnitude, and hence no scale.

    Args:
        layer: Gives the sizes; its parameters are to be handed over.
        inner: A layer of the larger size, on the meta device.
        inner_sizes: Its input and output features.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, inner: nn.Module, inner_sizes: tuple[int, int]) -> None:
        super().__init__(inner)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.spare_in, self.spare_out = inner_sizes[0] - self.in_features, inner_sizes[1] - self.out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        parameters = {"weight": pad(self.weight, (0, self.spare_in, 0, self.spare_out))}
        if self.bias is not None:
            parameters["bias"] = pad(self.bias, (0, self.spare_out))
        output: Tensor = functional_call(self.inner, parameters, (pad(input, (0, self.spare_in)),))
        return output[..., : self.out_features]

    def reset_parameters(self) -> None:
        """Initialise the parameters as torch does: Lightning asks for it where a model comes from the meta device."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # reads weight and bias, and nothing else

    def extra_repr(self) -> str:
        """See torch."""
        return f"{self.in_features} -> {self.out_features}, through {self.inner}"


def padded_to(layer: nn.Linear, multiple: int) -> nn.Linear:
    """Return a linear layer on the meta device with the sizes of ``layer`` rounded up to multiples."""
    return nn.Linear(
        layer.in_features + -layer.in_features % multiple,
        layer.out_features + -layer.out_features % multiple,
        bias=layer.bias is not None,
        device="meta",
        dtype=layer.weight.dtype,
    )


def pad_tokens(input: Tensor, multiple: int) -> Tensor:
    """Return ``[..., features]`` as a matrix whose rows, the tokens, are filled up with zeros to a multiple."""
    matrix = input.reshape(-1, input.shape[-1])
    return pad(matrix, (0, 0, 0, -matrix.shape[0] % multiple))


def unpad_tokens(output: Tensor, leading: torch.Size) -> Tensor:
    """Return the rows that belong to tokens, in the shape that they had."""
    return output[: leading.numel()].view(*leading, output.shape[-1])
