"""MuonSign: Muon for the matrices and StoSignSGD for the rest, with all states in low precision."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import ParamsT

from lightning_stosign.optim.base import Updates, check_choice
from lightning_stosign.optim.kernels.dispatch import Batch
from lightning_stosign.optim.kernels.eager import descend, draw_noise, put
from lightning_stosign.optim.kernels.job import Job, Kind, Numbers, kind_of
from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.numerics.orthogonal import orthogonalize
from lightning_stosign.optim.numerics.rounding import LARGEST_GRADIENT
from lightning_stosign.optim.sharding import local
from lightning_stosign.optim.states.state_precision import StatePrecision
from lightning_stosign.optim.states.storage import companions, read_state
from lightning_stosign.optim.stosign import check_options, stosign_kind, warn_if_envelope_cannot_decay
from lightning_stosign.optim.voting import Ballot

_MATCH_ADAMW = 0.2  # the RMS of AdamW's updates


class MuonSign(LowPrecisionOptimizer):
    r"""Muon for the matrices and StoSignSGD, in expectation, for the rest: one optimizer that trains with FP8 states.

    A matrix :math:`X` of :math:`a \times b` in a group with ``use_muon=True`` has one state, the momentum, and no
    second moment that could underflow. Its step does not depend on the momentum's scale:

    .. math::
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1) \nabla_t \\
        X_{t+1} &= X_t - 0.2 \eta \sqrt{\max(a, b)} \; \mathrm{orthogonal}\big(\beta_1 M_t + (1 - \beta_1) \nabla_t\big)
        - \eta \lambda X_t

    The factor gives it the RMS of AdamW's updates, so that one ``lr`` serves both parts. Embeddings, norms, biases and
    whatever else is not in such a group follow :class:`StoSignSGD` with ``stochastic=False``: AdamW, Muon's usual
    partner, is what collapses in FP8. With ``state_precision="fp8"`` a matrix has 1 byte of states per parameter, the
    rest has 2.

    Both parts store their states by ``state_precision``, step by the same kernels up to the orthogonalisation, and draw
    what noise there is as a pure function of (seed, step, parameter index, element index). The orthogonalisation is
    Muon's, in bfloat16 on accelerators and in float32 on the CPU. A sharded matrix is gathered for it, on every
    process; the shards then step as the unsharded matrix would.

    Args:
        params: parameters or param groups (float64, float32, bfloat16 or float16, dense). Groups with ``use_muon=True``
            hold 2-D parameters, Muon's: best the hidden layers' matrices.
        lr: learning rate, >= 0; a number or a tensor of one element. Muon's best, which is well above AdamW's.
        betas: :math:`\beta_1` in [0, 1) of both parts, and the decay of StoSignSGD's envelope in (0, 1].
        weight_decay: decoupled weight decay :math:`\lambda`, >= 0.
        stochastic: True steps the rest by random signs; their rate should then be about a tenth, in a group of its own.
        seed: of the noise, an int >= 0; the same on every replica.
        state_precision: a :class:`StatePrecision` or its name: how both parts store their states. Muon's step uses the
            momentum as stored. None: in float32, or float64 for a float64 parameter.
        maximize: ascend instead of descend.
        param_rounding: how a bfloat16 or float16 parameter is rounded after its update in float32: ``"stochastic"``,
            or ``"nearest"``, which loses steps that are below half the spacing of the parameter's numbers.
        fused: as in :class:`StoSignSGD`.
        on_nonfinite: what to do about a gradient with inf or NaN: ``"raise"`` a RuntimeError or ``"skip"`` the step
            with a warning. Parameters and states stay untouched either way. On an accelerator, where the host does not
            wait for the answer, the error or warning comes with the next step.

    Raises:
        ValueError: an option is out of range; a parameter is sparse, complex or not floating point, or one of a
            ``use_muon`` group is not 2-D.
        TypeError: an option is of the wrong type.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))
        >>> matrices = [model[1].weight]
        >>> rest = [model[0].weight, model[1].bias]
        >>> groups = [{"params": matrices, "use_muon": True}, {"params": rest}]
        >>> optimizer = MuonSign(groups, lr=0.02, state_precision="fp8")
        >>> model(torch.arange(9)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model[1].weight])
        ['exp_avg', 'exp_avg_scale', 'step']
        >>> optimizer.state[model[1].weight]["exp_avg"].dtype
        torch.float8_e4m3fn

    Source:
        K. Jordan et al., "Muon", 2024; learning-rate adjustment of J. Liu et al., arXiv 2502.16982; arXiv 2604.15416,
        Algorithm 10. The combination is this package's own.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 1.0),
        weight_decay: float = 0.0,
        *,
        stochastic: bool = False,
        seed: int = 0,
        state_precision: StatePrecision | str | None = None,
        maximize: bool = False,
        param_rounding: Literal["stochastic", "nearest"] = "stochastic",
        fused: bool | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "use_muon": False,
            "stochastic": stochastic,
            "seed": seed,
            "state_precision": state_precision,
            "maximize": maximize,
            "param_rounding": param_rounding,
            "fused": fused,
            "on_nonfinite": on_nonfinite,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if not group["use_muon"]:
                warn_if_envelope_cannot_decay(group)

    def vote_by(self, ballot: Ballot | None) -> None:
        """Refuse votes on steps that are no signs.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "MuonSign does not step matrices by signs, so workers cannot vote on its updates; use signs_of='gradients'"
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_options(group)
        check_choice("use_muon", group["use_muon"], (True, False))

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._check_param(param, group)
        if group["use_muon"] and param.dim() != 2:
            raise ValueError(
                f"params: a parameter of shape {list(param.shape)} in a group with use_muon=True; accepted: 2D "
                "parameters, others in a group without"
            )

    def _kind(self, group: dict[str, Any], precision: StatePrecision, round_param: bool) -> Kind:
        if not group["use_muon"]:
            return stosign_kind(group, precision, round_param)
        return kind_of(
            momentum=True,
            envelope=False,
            stochastic=False,
            maximize=group["maximize"],
            decays=False,
            precision=precision,
            round_param=round_param,
        )

    def _rates(self, group: dict[str, Any]) -> tuple[float, float]:
        beta1, beta2 = group["betas"]
        return 1 - beta1, beta2

    def _numbers(self, group: dict[str, Any], device: torch.device) -> Numbers:
        numbers = super()._numbers(group, device)
        # The kernels advance the momentum of a matrix and let the matrix be.
        return numbers._replace(lr=0.0, decay=1.0) if group["use_muon"] else numbers

    def _update(
        self, updates: Updates, jobs: Sequence[Job], batches: Sequence[Batch], found_inf: Tensor | None
    ) -> None:
        super()._update(updates, jobs, batches, found_inf)
        for (_, param, group), job in zip(updates, jobs, strict=True):
            if not group["use_muon"]:
                continue
            direction = _direction(job, self.state[param], group["betas"][0])
            lr, decay, *_ = super()._numbers(group, job.param.device)
            x = job.param if found_inf is None else job.param.clone()
            value = descend(x.to(direction.dtype), direction, lr, decay)
            put(x, value, job.kind, partial(draw_noise, job, 0, x))
            if found_inf is not None:
                job.param.copy_(torch.where(found_inf == 0, x, job.param))


def _direction(job: Job, state: dict[str, Any], beta1: float) -> Tensor:
    """Return what a matrix moves by at lr 1, in at least float32: of a sharded one, this process's part."""
    whole, dtype = job.whole, torch.promote_types(job.param.dtype, torch.float32)
    stored = {name: local(state[name]) for name in ("exp_avg", *companions(state, "exp_avg"))}
    m = read_state(stored, "exp_avg", job.kind.precision).to(dtype)
    g = job.grad.to(dtype).clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT)
    nesterov = (-g if job.kind.maximize else g).lerp(m, beta1)
    if isinstance(whole, DTensor):
        assert job.shard is not None
        nesterov = job.shard.wrap(nesterov, whole).full_tensor()
    # Most CPUs emulate bfloat16 products, which makes them some twenty times as slow as float32's.
    direction = orthogonalize(nesterov, torch.float32 if nesterov.device.type == "cpu" else torch.bfloat16)
    if isinstance(whole, DTensor):
        parts = distribute_tensor(direction, whole.device_mesh, whole.placements, src_data_rank=None)
        direction = parts.to_local()
    return direction.to(dtype).mul_(_MATCH_ADAMW * math.sqrt(max(whole.shape)))
