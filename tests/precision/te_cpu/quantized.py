"""Transformer Engine's quantised tensors: made empty, filled from values, and read."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from te_cpu import cuda_on_cpu, formats
from te_cpu.formats import DType, torch_dtype


def check(condition: Any, complaint: str) -> None:
    """Raise what the compiled library raises."""
    if not condition:
        raise RuntimeError(complaint)


def has_one_copy() -> bool:
    """Whether products take an FP8 operand in either order, so that no transposed copy is kept: Blackwell."""
    return (10, 0) <= cuda_on_cpu.answers.capability < (12, 0)


def kind_of(thing: Any) -> str:
    """``"Float8"``, ``"Block"``, ``"MX"`` or ``"NVFP4"``, of a quantizer or of a quantised tensor; empty for others."""
    for kind, prefixes in {
        "Block": ("Float8Block",),
        "Float8": ("Float8Quantizer", "Float8CurrentScalingQuantizer", "Float8Tensor"),
        "MX": ("MXFP8",),
        "NVFP4": ("NVFP4",),
    }.items():
        if type(thing).__name__.startswith(prefixes):
            return kind
    return ""


# Made empty

_CLASSES = {"Float8": "Float8Tensor", "Block": "Float8BlockwiseQTensor", "MX": "MXFP8Tensor", "NVFP4": "NVFP4Tensor"}


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: Any, device: Any = None, pin_memory: bool = False
) -> Any:
    """The tensor that a quantizer makes, with zeros for its bytes."""
    shape, kind = tuple(shape), kind_of(quantizer)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    target = "cpu" if device is None or torch.device(device).type == "cuda" else device
    by_row, by_column = quantizer.rowwise_usage, quantizer.columnwise_usage

    def empty(wanted: bool, size: Any, kind: torch.dtype = torch.uint8) -> Tensor | None:
        return torch.zeros(tuple(size), dtype=kind, device=target) if wanted else None

    def scales(column: bool, wanted: bool, kind: torch.dtype = torch.uint8) -> Tensor | None:
        return empty(wanted, quantizer.get_scale_shape(shape, column), kind)

    transposed = (columns, *shape[:-1])
    fields: dict[str, Any]
    if kind == "Float8":
        fields = {
            "data": empty(by_row or has_one_copy(), shape),
            "data_transpose": empty(by_column and not has_one_copy(), transposed),
            "fp8_scale_inv": empty(True, (1,), torch.float32),
            "fp8_dtype": _known_dtype(quantizer.dtype),
        }
    else:
        as_float = torch.float32 if kind == "Block" else torch.uint8
        fields = {
            "rowwise_data": empty(by_row, shape),
            "columnwise_data": empty(by_column, shape if kind == "MX" else transposed),
            "rowwise_scale_inv": scales(False, by_row, as_float),
            "columnwise_scale_inv": scales(True, by_column, as_float),
        }
        if kind == "Block":
            fields |= {"fp8_dtype": _known_dtype(quantizer.dtype), "is_2D_scaled": quantizer.block_scaling_dim == 2}
        elif kind == "MX":
            check(rows % 32 == columns % 32 == 0, f"MXFP8 takes multiples of 32, and this is {shape}")
            fields |= {"fp8_dtype": _known_dtype(quantizer.dtype), "with_gemm_swizzled_scales": False}
        elif kind == "NVFP4":
            check(rows % 16 == columns % 16 == 0, f"NVFP4 takes multiples of 16, and this is {shape}")
            packed = (*shape[:-1], columns // 2)
            fields |= {
                "rowwise_data": empty(by_row, packed),
                "columnwise_data": empty(by_column, (columns, rows // 2)),
                "amax_rowwise": empty(by_row, (1,), torch.float32),
                "amax_columnwise": empty(by_column, (1,), torch.float32),
                "fp4_dtype": _known_dtype(quantizer.dtype),
                "with_gemm_swizzled_scales": False,
            }
        else:
            raise NotImplementedError(f"te_cpu has no {type(quantizer).__name__}")
    name, fake_dtype = _CLASSES[kind], torch_dtype(dtype)
    if quantizer.internal:
        return _te_class(f"{name}Storage")(**fields, quantizer=quantizer, fake_dtype=fake_dtype)
    return _te_class(name)(
        shape=list(shape), dtype=fake_dtype, quantizer=quantizer, device=torch.device(target), **fields
    )


def _te_class(name: str) -> Any:
    return getattr(importlib.import_module("transformer_engine.pytorch"), name)


def _known_dtype(dtype: Any) -> Any:
    """The type as TE's Python writes it: an enum of its own since 2.17."""
    enum = getattr(importlib.import_module("transformer_engine.pytorch.constants"), "DType", None)
    return DType(int(dtype)) if enum is None else enum(int(dtype))


# Filled


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """The values in the quantizer's format; in ``output`` if there is one."""
    if quantizer is None:
        return tensor
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device)
    if (noop is None or noop.item() != 1) and tensor.numel() > 0:
        # A kernel writes into any memory, also into a tensor that inference mode made.
        with torch.inference_mode():
            _FILL[kind_of(quantizer)](tensor.detach().float(), tensor.dtype, quantizer, output)
    return output


def split_quantize(tensor: Tensor, sizes: list[int], quantizers: list[Any], **options: Any) -> list[Any]:
    """Each part by its own quantizer."""
    return [quantize(part, q) for part, q in zip(torch.split(tensor, sizes), quantizers, strict=True)]


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the gradient of the output in the quantizer's format."""
    return tensor.flatten(0, -2).float().sum(0).to(tensor.dtype), quantize(tensor, quantizer)


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _transposed(data: Tensor) -> Tensor:
    return _as_matrix(data).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def _reduced(amax: Tensor, quantizer: Any) -> Tensor:
    if quantizer.with_amax_reduction:
        group = quantizer.amax_reduction_group
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    return amax


def _fill_float8(values: Tensor, given: torch.dtype, quantizer: Any, out: Any) -> None:
    amax = values.abs().amax().reshape(1)
    if type(quantizer).__name__ == "Float8Quantizer":  # delayed scaling
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.reshape(quantizer.amax.shape)))
        scale = quantizer.scale.reshape(1)
    else:
        scale = formats.scale_for(
            _reduced(amax, quantizer),
            formats.largest(quantizer.dtype),
            quantizer.amax_epsilon,
            quantizer.force_pow_2_scales,
        )
    data = formats.encode(values * scale, quantizer.dtype)
    check(quantizer.rowwise_usage or has_one_copy(), "with one scale per tensor the copy by rows is needed too")
    out._data = data if out._data is None else out._data.copy_(data)
    keep = quantizer.columnwise_usage and not has_one_copy()
    if keep:
        copy = _transposed(data)
        out._transpose = copy if out._transpose is None else out._transpose.copy_(copy)
    else:
        out._transpose = None
    out._transpose_invalid = not keep
    out._scale_inv.copy_(scale.reciprocal())


def _by_direction(quantizer: Any, out: Any) -> list[tuple[bool, Tensor, Tensor]]:
    directions = []
    if quantizer.rowwise_usage:
        directions.append((False, out._rowwise_data, out._rowwise_scale_inv))
    if quantizer.columnwise_usage:
        directions.append((True, out._columnwise_data, out._columnwise_scale_inv))
    return directions


def _put(target: Tensor, values: Tensor) -> None:
    target[: values.shape[0], : values.shape[1]] = values  # the rest is padding


def _fill_block(values: Tensor, given: torch.dtype, quantizer: Any, out: Any) -> None:
    matrix, square = _as_matrix(values), quantizer.block_scaling_dim == 2
    for by_column, data, scales in _by_direction(quantizer, out):
        encoded, inverse = formats.encode_blocks(
            matrix.t().contiguous() if by_column else matrix,
            quantizer.dtype,
            square,
            quantizer.amax_epsilon,
            quantizer.force_pow_2_scales,
            torch.finfo(given).max,
        )
        data.copy_(encoded.view(data.shape))
        _put(scales, inverse if square else inverse.t())


def _fill_mx(values: Tensor, given: torch.dtype, quantizer: Any, out: Any) -> None:
    matrix = _as_matrix(values)
    for by_column, data, scales in _by_direction(quantizer, out):
        encoded, exponents = formats.encode_mx(matrix.t().contiguous() if by_column else matrix, quantizer.dtype)
        if by_column:  # stored in the order of the values all the same
            encoded, exponents = encoded.t(), exponents.t()
        data.copy_(encoded.reshape(data.shape))
        _put(scales, exponents)


def _fill_nvfp4(values: Tensor, given: torch.dtype, quantizer: Any, out: Any) -> None:
    for variant in ("row_scaled_nvfp4", "nvfp4_use_4over6"):
        check(not getattr(quantizer, variant, False), f"te_cpu has no {variant}")
    check(not quantizer.with_rht or given is torch.bfloat16, f"only bfloat16 values are rotated, and this is {given}")
    matrix = _as_matrix(values)
    for by_column, data, scales in _by_direction(quantizer, out):
        source = matrix.t().contiguous() if by_column else matrix
        if by_column and quantizer.with_rht:
            rotated = source.unflatten(1, (-1, 16)) @ quantizer.rht_matrix.float()
            source = rotated.bfloat16().float().flatten(1)
        amax = _reduced(source.abs().amax().reshape(1), quantizer)
        encoded, block_scales = formats.encode_nvfp4(
            source, amax, quantizer.with_2d_quantization, quantizer.stochastic_rounding
        )
        data.copy_(encoded.view(data.shape))
        _put(scales, block_scales)
        (out._amax_columnwise if by_column else out._amax_rowwise).copy_(amax)


_FILL = {"Float8": _fill_float8, "Block": _fill_block, "MX": _fill_mx, "NVFP4": _fill_nvfp4}


# Read


def values_of(tensor: Any, by_column: bool = False) -> Tensor:
    """A quantised tensor's values as a float32 matrix, from the copy by rows or the one by columns.

    Rotated NVFP4 values stay rotated: both operands of a product are, and the rotations cancel.
    """
    return operand_of(tensor, by_column) * factor_of(tensor)


def factor_of(tensor: Any) -> Tensor:
    """What a product is multiplied by afterwards, once its operands were summed over: a scale of the whole tensor."""
    return tensor._scale_inv if kind_of(tensor) == "Float8" else torch.ones(1)


def operand_of(tensor: Any, by_column: bool) -> Tensor:
    """The values without that factor."""
    kind = kind_of(tensor)
    if kind == "Float8":
        return _float8_operand(tensor, by_column)
    data, scales = (
        (tensor._columnwise_data, tensor._columnwise_scale_inv)
        if by_column
        else (tensor._rowwise_data, tensor._rowwise_scale_inv)
    )
    check(data is not None, f"the product needs the tensor by {'columns' if by_column else 'rows'}, which is not there")
    if kind == "Block":
        data = data.reshape(data.shape[0], -1) if by_column else _as_matrix(data)
        square = tensor._is_2D_scaled
        matrix = formats.decode_blocks(data, scales if square else scales.t(), tensor._fp8_dtype, square)
    elif kind == "MX":
        data = _as_matrix(data)
        if by_column:
            return formats.decode_mx(data.t(), scales.t(), tensor._fp8_dtype).t()
        return formats.decode_mx(data, scales, tensor._fp8_dtype)
    else:
        data = data.reshape(data.shape[0], -1) if by_column else _as_matrix(data)
        matrix = formats.decode_nvfp4(data, scales, tensor._amax_columnwise if by_column else tensor._amax_rowwise)
    return matrix.t() if by_column else matrix


def _float8_operand(tensor: Any, by_column: bool) -> Tensor:
    if tensor._data is not None and (has_one_copy() or not by_column):
        return _as_matrix(formats.decode(tensor._data, tensor._fp8_dtype))
    there = tensor._transpose is not None and not tensor._transpose_invalid
    check(there, "the product needs the tensor by columns, which is not there")
    values = formats.decode(tensor._transpose, tensor._fp8_dtype)
    return values.reshape(values.shape[0], -1).t()


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """The values, in a type of torch."""
    by_column = getattr(tensor, "_data", None) is None and getattr(tensor, "_rowwise_data", None) is None
    values = values_of(tensor, by_column)
    return values.reshape(tuple(tensor.size())).to(torch_dtype(dtype)).contiguous()


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """The bytes with their last dimension first."""
    copy = _transposed(data)
    return copy if out is None else out.copy_(copy)
