"""In the place of ``transformer_engine_torch``, the compiled module of Transformer Engine; see :mod:`te_cpu`."""

import enum
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from te_cpu import pointwise, products, quantized
from te_cpu.formats import DType as DType

for _module, _names in {
    products: ("generic_gemm", "te_general_grouped_gemm"),
    pointwise: (
        *("layernorm_fwd", "layernorm_bwd", "rmsnorm_fwd", "rmsnorm_bwd", "multi_tensor_adam"),
        "fused_amax_and_scale_update_after_reduction",
    ),
    quantized: (
        *("quantize", "split_quantize", "bgrad_quantize", "dequantize", "fp8_transpose"),
        "create_empty_quantized_tensor",
    ),
}.items():
    globals().update({name: getattr(_module, name) for name in _names})
globals().update(pointwise.activations())

FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{role}" for i in (1, 2, 3) for role in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"{role}{i}" for i in (1, 2, 3) for role in ("GRAD_OUTPUT", "GRAD_INPUT")], start=0
)
CommOverlapType = enum.IntEnum("CommOverlapType", ["RS", "AG"], start=0)
CommOverlapAlgo = enum.IntEnum("CommOverlapAlgo", ["BULK_OVERLAP_AG", "BULK_OVERLAP_RS"], start=0)
Float8BlockScaleTensorFormat = enum.IntEnum(
    "Float8BlockScaleTensorFormat", ["GEMM_READY", "COMPACT", "INVALID"], start=0
)


class _AnyMember(type):
    """An enum of something that nothing here computes with: a name becomes a member when it is asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__members__))
        return getattr(cls, name)

    @property
    def __members__(cls) -> dict[str, int]:
        return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def _unused(name: str) -> Any:
    return _AnyMember(name, (), {})


NVTE_Bias_Type, NVTE_Mask_Type, NVTE_Softmax_Type = map(_unused, ("Bias", "Mask", "Softmax"))
NVTE_QKV_Format, NVTE_QKV_Layout, NVTE_Fused_Attn_Backend = map(_unused, ("Format", "Layout", "Attention"))
NVTERoutingMapFormat, NVTEQBHistogramMode, NVTEScalingMode = map(_unused, ("Routing", "Histogram", "Scaling"))


class FP8TensorMeta:
    """Scales and amax history of delayed scaling."""

    scale = scale_inv = amax_history = None


class CommOverlapCore:
    """Userbuffers: named in annotations only, like its subclasses."""


class CommOverlapBase(CommOverlapCore): ...


class CommOverlapP2PBase(CommOverlapCore): ...


class CommOverlap(CommOverlapBase): ...


class CommOverlapP2P(CommOverlapP2PBase): ...


class CommOverlapHelper: ...


def get_cudnn_version() -> int:
    return 91500


def get_cublasLt_version() -> int:
    return 130000  # below what the grouped kernels want that read their sizes from the GPU


def get_num_cublas_streams() -> int:
    return 4


def device_supports_multicast(device_id: int = -1) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


def nvte_built_with_cublasmp() -> bool:
    return False


def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Any, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function where torch's autocast does not reach it, as it does not reach a compiled library."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return called


for _name, _function in list(globals().items()):
    if isinstance(_function, FunctionType) and not _name.startswith("_"):
        globals()[_name] = _without_autocast(_function)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"te_cpu has no transformer_engine_torch.{name}")

    return missing
