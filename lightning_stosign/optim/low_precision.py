"""The optimizers whose states are stored in low precision: from param groups and gradients to jobs for the dispatch."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from lightning_stosign.optim.base import Updates, check_choice, loss_of, nonfinite
from lightning_stosign.optim.kernels import dispatch
from lightning_stosign.optim.kernels.cpu import has_native, which_are_nonfinite
from lightning_stosign.optim.kernels.deferred import DeferredCheck, defers
from lightning_stosign.optim.kernels.eager import Constants, Rule, UpdateSpec
from lightning_stosign.optim.kernels.fused import as_tensor, has_compiler
from lightning_stosign.optim.kernels.job import Job, Path
from lightning_stosign.optim.numerics.noise import noise_key
from lightning_stosign.optim.sharding import local, local_grad
from lightning_stosign.optim.states.state_precision import FLOAT32, StatePrecision, precision_of
from lightning_stosign.optim.states.storage import init_state
from lightning_stosign.optim.voted_step import VotedSteps

# Values in all from which on a path is taken by default: below, eager steps take less than the path's compilation for
# hundreds of them.
WORTH: dict[Path, int] = {"native": 1_000_000, "compiled": 10_000_000}


class LowPrecisionOptimizer(VotedSteps):
    """Base of the optimizers that store their states by a :class:`StatePrecision`, with compiled and eager steps.

    A subclass implements :meth:`_rule` and :meth:`_rates`.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["state_precision"] is not None:
            defaults["state_precision"] = str(StatePrecision.parse(defaults["state_precision"]))
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.optim; its options and parameters are checked."""
        if param_group.get("state_precision") is not None:
            param_group["state_precision"] = str(StatePrecision.parse(param_group["state_precision"]))
        super().add_param_group(param_group)

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        super()._check_param(param, group)
        spec = group["state_precision"]
        if spec is None or not isinstance(param, DTensor) or all(p.is_replicate() for p in param.placements):
            return
        if StatePrecision.parse(spec).scaling == "block":
            raise ValueError(
                f"state_precision={spec!r}: the blocks of a sharded parameter would be cut by the shards; accepted: "
                "one scale a tensor ('fp8'), or none"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for values in self.state.values():  # a count that was saved as a plain number
            values["step"] = torch.as_tensor(values["step"], dtype=torch.int64, device="cpu")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("maximize", group["maximize"], (True, False))
        check_choice("param_rounding", group["param_rounding"], ("stochastic", "nearest"))
        check_choice("fused", group["fused"], (None, False, True))

    @abstractmethod
    def _rule(self, group: dict[str, Any]) -> Rule:
        """Return the update rule of a param group."""

    @abstractmethod
    def _rates(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return the weight of the gradient in the momentum and the decay of the envelope."""

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = loss_of(closure)
        if self._ballot is not None:
            self._step_by_vote(self._ballot)
            return loss
        self._report_deferred()
        updates = list(self._params_with_grad())
        finite: bool | Tensor = True
        if defers(updates):
            self._deferred = DeferredCheck(updates)
            finite = self._deferred.finite
        jobs = self._jobs(updates, finite)
        largest = dispatch.find_largest(jobs)
        if finite is True and not self._are_finite(updates, _which_are_nonfinite(jobs, largest)):
            return loss
        dispatch.run(jobs, largest)
        if jobs:
            torch._foreach_add_([job.state["step"] for job in jobs], 1)
        # Autograd does not see what kernels write, and would use a parameter that it saved before the step.
        torch.autograd.graph.increment_version([job.param for job in jobs if job.path != "eager"])
        return loss

    def _gives_signs(self, group: dict[str, Any]) -> bool:
        return self._rule(group).gives_signs

    def _jobs(self, updates: Updates, finite: bool | Tensor) -> list[Job]:
        """Return what to do; it changes nothing but creates missing states."""
        numel = sum(param.numel() for _, param, _ in updates)
        kinds: dict[Any, _Kind] = {}
        specs: dict[Any, UpdateSpec] = {}
        jobs = []
        for index, param, group in updates:
            kind = id(group), param.device
            if kind not in kinds:
                constants = self._constants(group, param.device, finite)
                path = _path(param.device, group["fused"], numel)
                numbers = as_tensor(constants, param.device) if path == "compiled" else None
                kinds[kind] = _Kind(constants, path, numbers)
            jobs.append(self._job(index, param, group, kinds[kind], specs))
        return jobs

    _deferred: DeferredCheck | None = None

    def _report_deferred(self) -> None:
        """Raise or warn about the last step's gradients, if the host did not wait for the answer then."""
        check, self._deferred = self._deferred, None
        offending = check.offending() if check is not None else []
        if offending:
            self._report_nonfinite([self._name(param) for param, _ in offending], [group for _, group in offending])

    def _constants(self, group: dict[str, Any], device: torch.device, finite: bool | Tensor) -> Constants:
        lr: Any = group["lr"]
        decay: Any = 1.0
        weight: Any
        beta2: Any
        weight, beta2 = self._rates(group)
        if isinstance(lr, Tensor):
            lr = lr.to(device).reshape(())
        if group["weight_decay"] != 0:
            decay = 1 - lr * group["weight_decay"]
        if isinstance(finite, bool):
            return Constants(lr, decay, weight, beta2)
        # A step that changes nothing, where a gradient is not finite.
        lr, decay, weight, beta2 = (
            torch.where(finite, torch.as_tensor(value, dtype=torch.float32, device=device), neutral)
            for value, neutral in ((lr, 0.0), (decay, 1.0), (weight, 0.0), (beta2, 1.0))
        )
        return Constants(lr, decay, weight, beta2, finite)

    def _job(
        self,
        index: int,
        param: Tensor,
        group: dict[str, Any],
        kind: "_Kind",
        specs: dict[Any, UpdateSpec],
    ) -> Job:
        state = self.state[param]
        precision = precision_of(state, group)
        if precision is not None and not precision.applies_to(param):
            precision = None
        key = id(group), precision, param.dtype
        if key not in specs:
            narrow = param.dtype.itemsize < 4
            specs[key] = UpdateSpec(
                self._rule(group), precision or FLOAT32, narrow and group["param_rounding"] == "stochastic"
            )
        spec = specs[key]
        if "step" not in state:
            # int64: exact beyond float32's 2**24 steps. On the CPU, where reading it costs no synchronisation.
            state["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
        for name in spec.rule.states:  # one by one: a momentum can be switched on in the middle of a run
            if name not in state:
                init_state(state, name, param, precision)
        seed, step = group.get("seed", 0), int(state["step"]) + 1
        keys = {stream: noise_key(seed, step, index, stream) for stream in spec.streams}
        return Job(param, local(param), local_grad(param), state, spec, keys, *kind)


class _Kind(NamedTuple):
    """What the parameters of a group on a device have in common; the last arguments of a :class:`Job`."""

    constants: Constants
    path: Path
    numbers: Tensor | None


def _which_are_nonfinite(jobs: Sequence[Job], largest: Sequence[dispatch.Largest]) -> list[bool]:
    """Return for each job whether this process's part of the gradient holds inf or NaN."""
    # What was just read need not be read again: these are finite only if all gradients were.
    known = {id(job) for members, values in largest if bool(values.isfinite().all()) for job in members}
    unknown = [job for job in jobs if id(job) not in known]
    grads = [job.grad for job in unknown]
    natively = which_are_nonfinite(grads) if {job.path for job in unknown} == {"native"} else None
    flags = iter(nonfinite(grads) if natively is None else natively)
    return [id(job) not in known and next(flags) for job in jobs]


def _path(device: torch.device, fused: bool | None, numel: int) -> Path:
    on_cpu = device.type == "cpu"
    if fused is False or (fused is None and not (on_cpu and numel >= min(WORTH.values()))):
        return "eager"
    path: Path = "native" if on_cpu and has_native() else "compiled"
    if (fused is None and numel < WORTH[path]) or (path == "compiled" and not has_compiler()):
        return "eager"
    return path
