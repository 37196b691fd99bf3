"""A strict stand-in for ``transformer_engine.pytorch`` (TE), for machines that cannot import it.

It has the constructor signatures of TE 2.20 (an unknown argument is an error), TE's ``_extra_state`` in the state dict,
TE's refusal to unpickle delayed-scaling state without an environment variable, and inside an enabled autocast TE's
size rules, its rule that a layer with reduced amax histories is called once, and its demand for bfloat16 where NVFP4
rotates. It makes its parameters where TE makes them: on "cuda" unless told otherwise, comparing ``device == "meta"`` as
TE does; a test may say that "cuda" is another device. It draws initial values from the global generator, as TE does. It
records the arguments of every ``autocast`` and ``quantized_model_init``. The recipe classes are TE's own.

It does not cover: FP8 arithmetic (products run in the activation type, "quantised" weights are exact), TE's demand for
CUDA inputs, tensor and sequence parallelism, the reduction of amax over ranks, torch.compile, CUDA graphs, hardware
limits of a recipe.
"""

import contextlib
import importlib
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def _import_recipes() -> ModuleType:
    name = "transformer_engine.common.recipe"
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        # The wheel without its compiled part: the variable lets its Python files in, and only this import sees it.
        os.environ["NVTE_PROJECT_BUILDING"] = "1"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # TE's remark that its part for torch is missing
                return importlib.import_module(name)
        finally:
            del os.environ["NVTE_PROJECT_BUILDING"]


recipes = _import_recipes()

CUDA = "cuda"  # where a parameter goes that TE would make on "cuda"
AUTOCASTS: list["autocast"] = []
QUANTIZED_INITS: list[dict[str, Any]] = []
_active: list["autocast"] = []
_quantized_init: list[dict[str, Any]] = []


class autocast:
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        assert recipe is None or isinstance(recipe, recipes.Recipe)
        self.enabled, self.recipe, self.amax_reduction_group = enabled, recipe, amax_reduction_group
        # What TE finds around it.
        self.torch_autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        self.called: set[nn.Module] = set()
        AUTOCASTS.append(self)

    def __enter__(self) -> "autocast":
        assert self not in _active, "autocast context manager cannot be entered more than once concurrently"
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        assert _active.pop() is self


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> autocast:
    warnings.warn("fp8_autocast is deprecated, use autocast", DeprecationWarning, stacklevel=2)
    return autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph)


@contextlib.contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    assert recipe is None or isinstance(recipe, recipes.Recipe)
    arguments = {"enabled": enabled, "recipe": recipe, "preserve": preserve_high_precision_init_val}
    QUANTIZED_INITS.append(arguments)
    _quantized_init.append(arguments)
    try:
        yield
    finally:
        _quantized_init.pop()


class QuantizedParameter(nn.Parameter):
    """Marks a weight of which TE would keep FP8 values only."""

    _initial: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        return self.detach().clone()

    def get_high_precision_init_val(self) -> torch.Tensor | None:
        return self._initial


def _fp8_recipe() -> Any:
    return _active[-1].recipe if _active and _active[-1].enabled else None


def _place(device: Any) -> Any:
    return CUDA if device == "cuda" else device


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        quantized = bool(_quantized_init) and _quantized_init[-1]["enabled"]
        self.primary_weights_in_fp8 = quantized
        self.recipe: Any = _quantized_init[-1]["recipe"] if quantized else None
        self.amax_history: list[float] = []
        self.initialisers: dict[str, Callable[[torch.Tensor], Any]] = {}

    def get_extra_state(self) -> torch.Tensor:
        if self.recipe is None or not self.recipe.delayed():
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": self.recipe, "amax_history_fwd": self.amax_history}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        if os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1":
            raise RuntimeError("Refusing to load pickled extra state: set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1")
        loaded = pickle.loads(state.numpy().tobytes())
        self.recipe, self.amax_history = loaded["recipe"], loaded["amax_history_fwd"]

    def make(self, name: str, shape: Any, device: Any, dtype: Any, initialiser: Callable[[torch.Tensor], Any]) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device=_place(device), dtype=dtype)))
        self.initialisers[name] = initialiser

    def reset_parameters(self, defer_init: bool = False) -> None:
        if defer_init:
            return
        for name, initialiser in self.initialisers.items():
            value = self.get_parameter(name).detach()
            if value.device == torch.device("meta"):
                value = torch.empty_like(value, device=CUDA)
            initialiser(value)
            parameter = nn.Parameter(value)
            if self.primary_weights_in_fp8 and name.endswith("weight") and value.dim() == 2:
                parameter = QuantizedParameter(value)
                parameter._initial = value.clone().cpu()
            setattr(self, name, parameter)

    def enter_fp8(self, inp: torch.Tensor, weights: list[torch.Tensor]) -> None:
        """What TE checks and records when a layer is called."""
        assert inp.shape[-1] == weights[0].shape[-1], "GEMM not possible"
        if not torch.is_autocast_enabled("cpu") and inp.dtype != weights[0].dtype:
            raise TypeError("Data types for parameters must match when outside of autocasted region")
        recipe = _fp8_recipe()
        if recipe is None:
            return
        if self.primary_weights_in_fp8:
            assert type(recipe) is type(self.recipe), "Recipe mismatch"
        self.recipe = recipe
        for tensor in (inp, *weights):
            rows, last = math.prod(tensor.shape[:-1]), tensor.shape[-1]
            if rows % 8 != 0 or last % 16 != 0:
                raise ValueError(f"FP8 execution requires multiples of 8 and 16, got dims={list(tensor.shape)}")
            block = 32 if recipe.mxfp8() else 16 if recipe.nvfp4() else 1
            if rows % block != 0 or last % block != 0:
                raise ValueError(f"{recipe} requires tensor dims that are divisible by {block}, got {tensor.shape}")
        if any(weight.shape[0] % 16 != 0 for weight in weights):
            raise ValueError("cuBLAS has no FP8 product with such a number of output features")
        if recipe.nvfp4() and not recipe.disable_rht and inp.dtype != torch.bfloat16:
            raise RuntimeError(f"RHT is only supported for bfloat16 input, got {inp.dtype}")
        if recipe.delayed():
            assert self not in _active[-1].called or not recipe.reduce_amax, "called twice in one autocast region"
            _active[-1].called.add(self)
            self.amax_history.append(max(inp.detach().abs().flatten().tolist(), default=0.0))


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    return nn.init.normal_(tensor, std=0.023)


class Linear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.params_dtype = params_dtype
        self.make("weight", (out_features, in_features), device, params_dtype, init_method or _normal)
        if bias:
            self.make("bias", out_features, device, params_dtype, nn.init.zeros_)
        else:
            self.bias = torch.empty(0, device=_place(device), dtype=params_dtype)
        self.reset_parameters(defer_init=device == "meta")

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False) -> Any:
        self.enter_fp8(inp, [self.weight])
        return F.linear(inp, self.weight, self.bias if self.use_bias else None)


class _Norm(_Base):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sm_margin: int | dict[str, int] = 0,
    ) -> None:
        super().__init__()
        assert normalized_shape is not None and hidden_size is None and params_dtype is None, "deprecated in TE"
        assert isinstance(eps, float)
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        device = "cuda" if device is None else device
        self.make("weight", shape, device, dtype, nn.init.ones_)
        if isinstance(self, LayerNorm):
            self.make("bias", shape, device, dtype, nn.init.zeros_)
        self.reset_parameters(defer_init=device == "meta")


class LayerNorm(_Norm):
    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(inp, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(inp, self.weight.shape, self.weight, self.eps)


class _Fused(_Base):
    """What LayerNormLinear and LayerNormMLP share."""

    def make_norm(self, size: int, eps: float, normalization: str, device: Any, dtype: Any) -> None:
        assert normalization in ("LayerNorm", "RMSNorm")
        self.eps, self.normalization = eps, normalization
        self.make("layer_norm_weight", size, device, dtype, nn.init.ones_)
        if normalization == "LayerNorm":
            self.make("layer_norm_bias", size, device, dtype, nn.init.zeros_)
        else:
            self.layer_norm_bias = None

    def norm(self, inp: torch.Tensor) -> torch.Tensor:
        shape = self.layer_norm_weight.shape
        if self.normalization == "RMSNorm":
            return F.rms_norm(inp, shape, self.layer_norm_weight, self.eps)
        return F.layer_norm(inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)


class LayerNormLinear(_Fused):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        init_method: Any = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.make_norm(in_features, eps, normalization, device, params_dtype)
        self.make("weight", (out_features, in_features), device, params_dtype, init_method or _normal)
        self.use_bias = bias
        if bias:
            self.make("bias", out_features, device, params_dtype, nn.init.zeros_)
        self.reset_parameters(defer_init=device == "meta")

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_grad: bool = False) -> Any:
        self.enter_fp8(inp, [self.weight])
        return F.linear(self.norm(inp), self.weight, self.bias if self.use_bias else None)


class LayerNormMLP(_Fused):
    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.activation = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}[activation]
        self.make_norm(hidden_size, eps, normalization, device, params_dtype)
        self.make("fc1_weight", (ffn_hidden_size, hidden_size), device, params_dtype, _normal)
        self.make("fc2_weight", (hidden_size, ffn_hidden_size), device, params_dtype, _normal)
        self.use_bias = bias
        if bias:
            self.make("fc1_bias", ffn_hidden_size, device, params_dtype, nn.init.zeros_)
            self.make("fc2_bias", hidden_size, device, params_dtype, nn.init.zeros_)
        self.reset_parameters(defer_init=device == "meta")

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        self.enter_fp8(inp, [self.fc1_weight, self.fc2_weight])
        hidden = self.activation(F.linear(self.norm(inp), self.fc1_weight, self.fc1_bias if self.use_bias else None))
        return F.linear(hidden, self.fc2_weight, self.fc2_bias if self.use_bias else None)
