"""A strict stand-in for ``transformer_engine.pytorch`` (TE), for machines that cannot import it.

It has the constructor signatures of TE 2.20 (an unknown argument is an error), TE's ``_extra_state`` in the state dict,
TE's refusal to unpickle delayed-scaling state without an environment variable, and TE's size rules inside an enabled
autocast. It makes its parameters where TE makes them: on "cuda" unless told otherwise, comparing ``device == "meta"``
as TE does. It records the arguments of every ``autocast``. The recipe classes are TE's own.

It does not cover: FP8 arithmetic (products run in the activation type), TE's demand for CUDA inputs, FP8 weights,
tensor and sequence parallelism, the reduction of amax over ranks, fused layers, torch.compile, CUDA graphs, the larger
size rules of the block recipes.
"""

import importlib
import math
import os
import pickle
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn


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

AUTOCASTS: list["autocast"] = []
_active: list["autocast"] = []


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
        AUTOCASTS.append(self)

    def __enter__(self) -> "autocast":
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        assert _active.pop() is self


def _fp8_recipe() -> Any:
    return _active[-1].recipe if _active and _active[-1].enabled else None


class _WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recipe: Any = None
        self.amax_history: list[float] = []

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


class Linear(_WithExtraState):
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
        params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.params_dtype = params_dtype
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=params_dtype))
        else:
            self.bias = torch.empty(0, device=device, dtype=params_dtype)
        if device != "meta":
            for parameter in self.parameters():
                if parameter.device == torch.device("meta"):
                    raise RuntimeError("te.Linear materialises this on CUDA, which is not here")
                nn.init.normal_(parameter, std=0.023)

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False) -> Any:
        recipe = _fp8_recipe()
        if recipe is not None:
            self.recipe = recipe
            for tensor in (inp, self.weight):
                rows, last = math.prod(tensor.shape[:-1]), tensor.shape[-1]
                if rows % 8 != 0 or last % 16 != 0:
                    raise ValueError(f"FP8 execution requires multiples of 8 and 16, got dims={list(tensor.shape)}")
            if self.out_features % 16 != 0:
                raise ValueError(f"cuBLAS has no FP8 product with {self.out_features} output features")
            self.amax_history.append(inp.detach().abs().max().item())
        bias = self.bias if self.use_bias else None
        if not torch.is_autocast_enabled("cpu") and inp.dtype != self.weight.dtype:
            raise AssertionError("Data types for parameters must match when outside of autocasted region")
        return nn.functional.linear(inp, self.weight, bias)


class _Norm(_WithExtraState):
    def __init__(self, shape: Any, eps: float, device: Any, dtype: Any, zero_centered_gamma: bool, bias: bool) -> None:
        super().__init__()
        assert isinstance(eps, float)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        device = torch.device("cuda" if device is None else device)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))


class LayerNorm(_Norm):
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
        assert normalized_shape is not None and hidden_size is None and params_dtype is None, "deprecated in TE"
        super().__init__(normalized_shape, eps, device, dtype, zero_centered_gamma, bias=True)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(inp, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
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
        assert normalized_shape is not None and hidden_size is None and params_dtype is None, "deprecated in TE"
        super().__init__(normalized_shape, eps, device, dtype, zero_centered_gamma, bias=False)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(inp, self.weight.shape, self.weight, self.eps)
