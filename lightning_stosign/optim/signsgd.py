"""SignSGD with momentum, also known as Signum: the biased baseline."""

from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_stosign.optim.base import check_beta
from lightning_stosign.optim.kernels.job import Kind, kind_of
from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.states.state_precision import StatePrecision


class SignSGD(LowPrecisionOptimizer):
    r"""Moves each coordinate by ``lr`` against the sign of the momentum.

    .. math::
        m_t &= \beta m_{t-1} + (1 - \beta) g_t \\
        x_{t+1} &= x_t - \eta \, \mathrm{sign}(m_t) - \eta \lambda x_t

    with :math:`m_0 = 0` and :math:`\mathrm{sign}(0) = 0`.

    Args:
        params: parameters or param groups (float64, float32, bfloat16 or float16, dense).
        lr: learning rate, >= 0; a number or a tensor of one element. A third to a tenth of AdamW's.
        momentum: :math:`\beta` in [0, 1). With 0 no momentum is stored.
        weight_decay: decoupled weight decay :math:`\lambda`, >= 0.
        state_precision: a :class:`StatePrecision` or its name: how ``exp_avg`` (m) is stored. None: in float32, or
            float64 for a float64 parameter. The step uses the values as stored.
        maximize: ascend instead of descend.
        param_rounding: how a bfloat16 or float16 parameter is rounded after its update in float32: ``"stochastic"``,
            or ``"nearest"``, which loses steps that are below half the spacing of the parameter's numbers.
        fused: True does the whole update in one pass, False in many, None chooses; as in :class:`StoSignSGD`.
        on_nonfinite: what to do about a gradient with inf or NaN: ``"raise"`` a RuntimeError or ``"skip"`` the step
            with a warning. Parameters and states stay untouched either way. On an accelerator, where the host does not
            wait for the answer, the error or warning comes with the next step.

    Raises:
        ValueError: an option is out of range; a parameter is sparse, complex or not floating point.
        TypeError: an option is of the wrong type.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 0.0]))
        >>> optimizer = SignSGD([x], lr=0.5)
        >>> x.square().sum().backward()
        >>> optimizer.step()
        >>> x.data
        tensor([ 2.5000, -1.5000,  0.0000])

    Source:
        arXiv 2604.15416, Algorithm 5; Bernstein et al., "signSGD", ICML 2018.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        state_precision: StatePrecision | str | None = None,
        maximize: bool = False,
        param_rounding: Literal["stochastic", "nearest"] = "stochastic",
        fused: bool | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "state_precision": state_precision,
            "maximize": maximize,
            "param_rounding": param_rounding,
            "fused": fused,
            "on_nonfinite": on_nonfinite,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_beta("momentum", group["momentum"])

    def _kind(self, group: dict[str, Any], precision: StatePrecision, round_param: bool) -> Kind:
        return kind_of(
            momentum=group["momentum"] != 0,
            envelope=False,
            stochastic=False,
            maximize=group["maximize"],
            decays=False,
            precision=precision,
            round_param=round_param,
        )

    def _rates(self, group: dict[str, Any]) -> tuple[float, float]:
        return 1 - group["momentum"], 1.0
