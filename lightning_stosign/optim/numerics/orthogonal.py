"""Orthogonalisation: a matrix with its singular values brought near 1, as Muon steps by."""

import torch
from torch import Tensor

from lightning_stosign.optim.numerics.rounding import power_of_two_scale

# K. Jordan's: the steepest quintic at 0 that keeps singular values between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPS = 1e-7


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``U V^T`` of a matrix ``U S V^T``, about: five Newton-Schulz iterations, as in torch's Muon.

    The result does not depend on the matrix's scale. Torch's does where squares of the values leave float32's range or
    where the norm is below 1e-7; elsewhere both have the same bits in bfloat16.

    Args:
        matrix: floating point, ``[rows, columns]``, finite.
        dtype: what to compute in: bfloat16 suffices.

    Returns:
        Of that dtype, same shape; zeros for a matrix of zeros.

    Example:
        >>> orthogonalize(torch.tensor([[2e-30, 0.0], [0.0, 1e-30]]), torch.float32).diag().round(decimals=1)
        tensor([0.7000, 1.1000])

    Source:
        K. Jordan et al., "Muon", 2024.
    """
    # A power of two changes no digit.
    x = (matrix / power_of_two_scale(matrix.abs().amax(), 1.0)).to(dtype)
    if is_tall := x.size(0) > x.size(1):
        x = x.T
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if is_tall else x
