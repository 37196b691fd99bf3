"""Norms fused with the linear layers that follow them, by Transformer Engine (TE), without a change of any name."""

from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_stosign.precision._layers import HollowLayer, is_plain_linear, take_over
from lightning_stosign.precision._padding import pad_tokens, unpad_tokens
from lightning_stosign.precision.te_layers import rms_norm_eps, without_extra_state


class Chain(NamedTuple):
    """Neighbours in an ``nn.Sequential`` that one of TE's layers computes at once.

    Attributes:
        norm: A LayerNorm or RMSNorm over one dimension.
        linears: One linear layer, or the two of an MLP.
        activation: What is between the two, in TE's words; None if there is one.
    """

    norm: nn.Module
    linears: tuple[nn.Linear, ...]
    activation: str | None


class FusedNorm(nn.Module):
    """Holds the parameters of a norm, whose work a later module does.

    Args:
        kind: The type of what it stands for.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.kind = kind

    def reset_parameters(self) -> None:
        """Initialise the parameters as torch does: Lightning asks for it where a model comes from the meta device."""
        cast(Any, self.kind).reset_parameters(self)

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return input


class FusedLinear(FusedNorm):
    """Holds the parameters of a linear layer, whose work a later module does."""


class FusedLayer(HollowLayer):
    """The last linear layer of a chain, which does the work of all of it.

    Args:
        chain: The modules; the parameters of the last one are to be handed over.
        holders: What holds the parameters of those before it.
        inner: TE's fused layer, on the meta device.
        multiple: TE wants a multiple of this many tokens.
    """

    def __init__(self, chain: Chain, holders: tuple[nn.Module, ...], inner: nn.Module, multiple: int) -> None:
        super().__init__(inner)
        last = chain.linears[-1]
        self.in_features, self.out_features = last.in_features, last.out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        # In a tuple, modules are not children: their parameters keep the names that they have.
        prefixes = ("layer_norm_", "") if len(chain.linears) == 1 else ("layer_norm_", "fc1_", "fc2_")
        self.holders = tuple(zip(prefixes, holders, strict=False))
        self.prefix, self.multiple = prefixes[-1], multiple

    def reset_parameters(self) -> None:
        """As :meth:`FusedNorm.reset_parameters`."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]  # reads weight and bias, and nothing else

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., features of the norm]`` to ``[..., out_features]``."""
        parameters: dict[str, Tensor] = {
            prefix + name: parameter
            for prefix, holder in (*self.holders, (self.prefix, self))
            for name, parameter in holder.named_parameters(recurse=False)
        }
        leading = input.shape[:-1]
        return unpad_tokens(
            cast(Tensor, functional_call(self.inner, parameters, (pad_tokens(input, self.multiple),))), leading
        )


def fuse_chains(
    root: nn.Module, kept: dict[nn.Module, list[str]], te: ModuleType, multiple: int, dtype: torch.dtype
) -> list[str]:
    """Fuse what ``nn.Sequential`` proves to be a chain; see :meth:`Float8Backend.fuse`.

    A chain is a norm and a linear layer (``te.LayerNormLinear``), or a norm, a linear layer, an activation and a linear
    layer back to the norm's size (``te.LayerNormMLP``). In other modules the order of the children says nothing about
    what is called with what. A module with a hook, or with several names, is left alone: what happens between two
    modules of a chain would not happen any more.
    """
    fused = []
    for sequence in list(root.modules()):
        if type(sequence) is not nn.Sequential:
            continue
        for start in range(len(sequence)):
            chain = _chain_at(sequence, start, kept, multiple)
            if chain is not None:
                _fuse(sequence, start, chain, te, multiple, dtype)
                fused += [kept[linear][0] for linear in chain.linears]
    return fused


def _chain_at(sequence: nn.Sequential, start: int, kept: dict[nn.Module, list[str]], multiple: int) -> Chain | None:
    norm, *rest = list(sequence)[start : start + 4]

    def is_free(module: nn.Module) -> bool:
        return len(kept.get(module, ())) == 1 and not _has_hooks(module) and module.training == sequence.training

    def fits(module: nn.Module) -> bool:
        return (
            is_free(module)
            and is_plain_linear(module)
            and module.in_features % multiple == module.out_features % multiple == 0
        )

    if not (is_free(norm) and _is_fusible_norm(norm)):
        return None
    if len(rest) == 3 and fits(rest[0]) and is_free(rest[1]) and fits(rest[2]):
        first, second = cast(nn.Linear, rest[0]), cast(nn.Linear, rest[2])
        activation = _activation(rest[1])
        same = first.in_features == second.out_features and (first.bias is None) == (second.bias is None)
        if activation is not None and same:
            return Chain(norm, (first, second), activation)
    if rest and fits(rest[0]):
        return Chain(norm, (cast(nn.Linear, rest[0]),), None)
    return None


def _is_fusible_norm(module: nn.Module) -> bool:
    if type(module) is nn.LayerNorm:
        return len(module.normalized_shape) == 1 and module.bias is not None
    return type(module) is nn.RMSNorm and len(module.normalized_shape) == 1 and module.weight is not None


def _activation(module: nn.Module) -> str | None:
    """TE's name of an activation; its "gelu" is the tanh approximation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "tanh" else None
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def _has_hooks(module: nn.Module) -> bool:
    return any("hook" in name and value for name, value in vars(module).items())


def _fuse(sequence: nn.Sequential, start: int, chain: Chain, te: ModuleType, multiple: int, dtype: torch.dtype) -> None:
    norm, linears = chain.norm, chain.linears
    options: dict[str, Any] = {
        "eps": rms_norm_eps(norm) if isinstance(norm, nn.RMSNorm) else float(cast(Any, norm).eps),
        "bias": linears[0].bias is not None,
        "normalization": type(norm).__name__,
        "params_dtype": dtype,
        "device": "meta",
    }
    if chain.activation is None:
        inner = te.LayerNormLinear(linears[0].in_features, linears[0].out_features, **options)
    else:
        options["activation"] = chain.activation
        inner = te.LayerNormMLP(linears[0].in_features, linears[0].out_features, **options)
    for meta in inner.param_init_meta.values():
        meta.init_fn = nn.init.zeros_  # never called, for these parameters are thrown away; TE's could not be pickled

    holders = (FusedNorm(type(norm)), *(FusedLinear(nn.Linear) for _ in linears[:-1]))
    for original, holder in zip((norm, *linears[:-1]), holders, strict=True):
        take_over(original, holder)
    last = FusedLayer(chain, holders, without_extra_state(inner), multiple)
    take_over(linears[-1], last)
    # The norm and, of an MLP, the first linear layer hold their parameters; the activation has none.
    places = (*holders, last) if chain.activation is None else (*holders, nn.Identity(), last)
    for place, module in enumerate(places, start):
        sequence[place] = module
