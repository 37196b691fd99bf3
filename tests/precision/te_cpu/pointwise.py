"""Norms, activations and optimizer steps of the compiled library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from te_cpu.formats import scale_for, torch_dtype
from te_cpu.quantized import quantize

Activation = Callable[[Tensor], Tensor]


# Norms


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.detach().float() + float(zero_centered)


def _normalized(values: Tensor, out: Any, quantizer: Any, dtype: Any) -> Any:
    values = values.to(torch_dtype(dtype))
    if quantizer is None:
        return values if out is None else out.copy_(values)
    return quantize(values, quantizer, out)


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """The normalised values, the means and the inverse deviations."""
    values = input.detach().float()
    deviations, means = torch.var_mean(values, -1, correction=0, keepdim=True)
    inverse = torch.rsqrt(deviations + eps)
    result = (values - means) * inverse * _gamma(weight, zero_centered_gamma)
    if bias is not None:
        result = result + bias.detach().float()
    return [_normalized(result, ln_out, quantizer, otype), means.flatten(), inverse.flatten()]


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """The normalised values, nothing, and the inverse root mean squares."""
    values = input.detach().float()
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    result = values * inverse * _gamma(weight, zero_centered_gamma)
    return [_normalized(result, ln_out, quantizer, otype), None, inverse.flatten()]


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """The gradients of the input, the weight and the bias."""
    grad, values = dz.float().flatten(0, -2), x.detach().float().flatten(0, -2)
    unit = (values - mu[:, None]) * rsigma[:, None]
    scaled = grad * _gamma(gamma, zero_centered_gamma)
    dx = scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True)
    dx = (dx * rsigma[:, None]).view(x.shape).to(x.dtype)
    return [dx, (grad * unit).sum(0).to(gamma.dtype), grad.sum(0).to(gamma.dtype)]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """The gradients of the input and the weight."""
    grad, values = dz.float().flatten(0, -2), x.detach().float().flatten(0, -2)
    unit = values * rsigma[:, None]
    scaled = grad * _gamma(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return [dx.view(x.shape).to(x.dtype), (grad * unit).sum(0).to(gamma.dtype)]


# Activations

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "srelu": lambda x: F.relu(x).square(),
}
_GATES: dict[str, Activation] = {
    "glu": torch.sigmoid,
    "geglu": _ACTIVATIONS["gelu"],
    "reglu": F.relu,
    "swiglu": F.silu,
}


def _gated(gate: Activation) -> Activation:
    def activate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return gate(first) * second

    return activate


def _backward(activation: Activation, grad: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_()
        result = activation(leaf)
        return torch.autograd.grad(result, leaf, grad.detach().float().view(result.shape))[0]


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient before a GELU."""
    return _backward(_ACTIVATIONS["gelu"], grad, x)


def activations() -> dict[str, Callable[..., Any]]:
    """The functions ``act``, ``dact`` and ``dbias_dact`` of every activation."""
    functions: dict[str, Callable[..., Any]] = {}
    for name, activation in {**_ACTIVATIONS, **{name: _gated(gate) for name, gate in _GATES.items()}}.items():

        def forward(input: Tensor, quantizer: Any, activation: Activation = activation) -> Any:
            return quantize(activation(input.detach().float()).to(input.dtype), quantizer)

        def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any, activation: Activation = activation) -> Any:
            return quantize(_backward(activation, grad, fwd_input).to(grad.dtype), quantizer)

        def with_bias(grad: Tensor, fwd_input: Tensor, quantizer: Any, activation: Activation = activation) -> Any:
            result = _backward(activation, grad, fwd_input).view(grad.shape)
            return [result.flatten(0, -2).sum(0).to(grad.dtype), quantize(result.to(grad.dtype), quantizer)]

        functions |= {name: forward, f"d{name}": backward, f"dbias_d{name}": with_bias}
    return functions


# Optimizers and scales


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam (mode 0) or AdamW (mode 1) on lists of gradients, parameters, moments and, maybe, master weights."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, param, m, v, *master in zip(*tensor_lists, strict=True):
        exact = (master[0] if master else param).detach()
        value, slope = exact.float(), grad.float() + (0.0 if mode else weight_decay) * exact.float()
        m.copy_(beta1 * m + (1 - beta1) * slope)
        v.copy_(beta2 * v + (1 - beta2) * slope.square())
        update = (m / first) / ((v / second).sqrt() + epsilon) + (weight_decay if mode else 0.0) * value
        exact.copy_(value - lr * update)
        if master:
            param.detach().copy_(exact)


@torch.inference_mode()  # a kernel writes into any memory
def fused_amax_and_scale_update_after_reduction(
    buffer: Tensor, amax_histories: list[Tensor], scales: list[Tensor], algo: str, fp8_dtype: Any, margin: int
) -> None:
    """Delayed scaling at the end of a step: the new amax enters each history, and the scales follow.

    Row 0 gathers; what it holds moves to the end of the history, whose first entry goes.
    """
    top = torch.finfo(torch_dtype(fp8_dtype)).max / 2.0**margin
    sizes = [scale.numel() for scale in scales]
    for seen, history, scale in zip(torch.split(buffer, sizes), amax_histories, scales, strict=True):
        last = torch.where(seen != 0, seen, history[0])
        rolled = torch.cat((history[1:], last[None]))
        amax = torch.where(last != 0, rolled.amax(0) if algo == "max" else last, 0.0)
        rolled[0] = 0
        history.copy_(torch.where(last != 0, rolled, history))
        usable = torch.isfinite(amax) & (amax > 0)
        scale.copy_(torch.where(usable, scale_for(amax, top), scale))
