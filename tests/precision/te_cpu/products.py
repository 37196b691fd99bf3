"""Matrix products, with the operands and the sizes that cuBLAS takes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu as gelu_of

from te_cpu.formats import torch_dtype
from te_cpu.pointwise import gelu_backward
from te_cpu.quantized import check, dequantize, factor_of, has_one_copy, kind_of, operand_of, quantize


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """``D = B A^T`` in the order of rows, with A or B transposed: cuBLAS counts by columns, and A comes first there."""
    check(comm_overlap is None, "te_cpu has no userbuffers")
    low = bool(kind_of(A))
    check(low == bool(kind_of(B)), "one operand is quantised and the other is not")
    dtype = torch_dtype(output_dtype) if output_dtype is not None else (torch.float32 if low else A.dtype)
    # Both as they lie, from the copy that the product reads along its rows.
    first, second = _operand(A, by_column=not transA), _operand(B, by_column=transB)
    left = second.t() if transB else second  # [n, k]
    right = first.t() if transA else first  # [k, m]
    if low:
        _check_sizes(A, B, transA, transB, m=right.shape[1], n=left.shape[0], k=left.shape[1], dtype=dtype)
    check(left.shape[1] == right.shape[0], f"inner sizes differ: {tuple(left.shape)} and {tuple(right.shape)}")
    result = left.float() @ right.float()
    if low:
        result = result * (factor_of(A) * factor_of(B))
    result = alpha * result

    bias_grad = before_gelu = None
    if bias is not None and bias.numel() > 0:
        if grad:
            values = dequantize(B, torch.float32) if low else B.detach()
            bias_grad = values.flatten(0, -2).float().sum(0).to(dtype)
        else:
            result = result + bias.detach().float()
    if gelu and grad:
        result = gelu_backward(result, gelu_in.detach().reshape(result.shape))
    elif gelu:
        before_gelu = result.to(torch_dtype(bias_type) if low else dtype)
        result = gelu_of(result, approximate="tanh")

    rows = (B.size()[-1],) if transB else tuple(B.size())[:-1]
    result = result.view(*rows, right.shape[1])
    if D is None:
        result = result.to(dtype)
        return [result if quantizer is None else quantize(result, quantizer), bias_grad, before_gelu, extra_output]
    check(D.shape == result.shape, f"the output has the shape {tuple(D.shape)}, and must have {tuple(result.shape)}")
    check(output_dtype is None or D.dtype == dtype, f"the output is {D.dtype}, and must be {dtype}")
    if accumulate:
        result = result + (1.0 if beta is None else beta) * D.detach().float()
    with torch.no_grad():
        D.copy_(result)
    return [D, bias_grad, before_gelu, extra_output]


def te_general_grouped_gemm(
    A: list[Any],
    transA: bool,
    B: list[Any],
    transB: bool,
    D: list[Tensor],
    D_type: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspace: list[Tensor],
    workspaceSize: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """One product per group; a group without tokens gives zeros where its product has entries."""
    outputs = list(torch.split(D[0], m_splits)) if single_output else D
    for i, (a, b, out) in enumerate(zip(A, B, outputs, strict=True)):
        if 0 in (*a.size(), *b.size()):
            if not accumulate:
                out.zero_()
            if grad:
                bias[i].zero_()
            continue
        _, bias_grad, _, _ = generic_gemm(
            *(a, transA, b, transB, out, None, D_type, bias[i], bias_type, False, None, grad, workspace[0], 0),
            accumulate,
            use_split_accumulator,
        )
        if bias_grad is not None:
            bias[i].copy_(bias_grad)
    return bias


def _operand(tensor: Any, by_column: bool) -> Tensor:
    if kind_of(tensor):
        return operand_of(tensor, by_column)
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _check_sizes(A: Any, B: Any, transA: bool, transB: bool, *, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """What cuBLAS asks of FP8 operands: their rows, and those of the output, begin at multiples of 16 bytes."""
    kind = kind_of(A)
    if kind == "Float8" and has_one_copy():
        check((k if transA else m) % 16 == 0, "the rows of the first operand are not multiples of 16")
        check((n if transB else k) % 16 == 0, "the rows of the second operand are not multiples of 16")
    elif kind == "Float8":
        check(k % 16 == 0, f"the inner size is {k}, not a multiple of 16")
    elif kind == "Block":
        check(not (A._is_2D_scaled and B._is_2D_scaled), "at most one operand has square blocks")
        check(k % 16 == 0, f"the inner size is {k}, not a multiple of 16")
        check(m % 8 == 0 and (B._is_2D_scaled or n % 8 == 0), f"outer sizes {m} and {n} are not multiples of 8")
    check(m * dtype.itemsize % 16 == 0, f"the rows of the output, {m} values of {dtype}, are not multiples of 16 bytes")
