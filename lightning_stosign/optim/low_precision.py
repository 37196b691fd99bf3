"""The optimizers whose states are stored in low precision: from param groups and gradients to jobs for the dispatch."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT, StateDict

from lightning_stosign._torch_private import foreach_add
from lightning_stosign.optim.base import Updates, check_choice, loss_of
from lightning_stosign.optim.kernels import dispatch
from lightning_stosign.optim.kernels.deferred import DeferredCheck, defers
from lightning_stosign.optim.kernels.job import Job, Kind, Numbers
from lightning_stosign.optim.numerics.noise import Stream, noise_key, uniform_noise
from lightning_stosign.optim.sharding import local, max_over_shards
from lightning_stosign.optim.states.state_precision import (
    FLOAT32,
    OVERRIDE,
    StatePrecision,
    precision_of,
    warn_if_too_small,
)
from lightning_stosign.optim.states.storage import init_state
from lightning_stosign.optim.voted_step import VotedSteps, worker_seed
from lightning_stosign.optim.voting import Ballot, Entry


class LowPrecisionOptimizer(VotedSteps):
    """Base of the optimizers that store their states by a :class:`StatePrecision`, stepped by the kernels of a backend.

    A subclass implements :meth:`_kind` and :meth:`_rates`.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._counts, self._stored_in = {}, {}
        if defaults["state_precision"] is not None:
            defaults["state_precision"] = str(StatePrecision.parse(defaults["state_precision"]))
        super().__init__(params, defaults)
        self._warn_of_small_parameters()

    def _warn_of_small_parameters(self) -> None:
        by_precision: dict[str, list[Tensor]] = {}
        for group in self.param_groups:
            if group["state_precision"] is not None:
                by_precision.setdefault(group["state_precision"], []).extend(group["params"])
        for spec, of_spec in by_precision.items():
            warn_if_too_small(type(self).__name__, StatePrecision.parse(spec), of_spec)

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
                "one scale per tensor ('fp8'), or none"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt_states()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state, as in torch.optim, but with every state tensor in the dtype it was saved in.

        Options in the state_dict's param groups replace the current ones, ``state_precision`` included.
        """
        super().load_state_dict(state_dict)
        self._adopt_states()

    def _adopt_states(self) -> None:
        """Put the step counts of loaded states where they belong, and remember how the states are stored."""
        for param, values in self.state.items():
            # A count may be saved as a plain number.
            values["step"] = torch.as_tensor(values["step"], dtype=torch.int64, device=_count_device(param))
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        self._stored_in = {param: group["state_precision"] for param, group in groups if param in self.state}
        self._counts = {}

    def _groups_changed(self, changed: list[dict[str, Any]]) -> None:
        super()._groups_changed(changed)
        # A parameter that left and comes back is a new one.
        self._stored_in = {param: spec for param, spec in self._stored_in.items() if param in self.state}
        self._counts = {param: count for param, count in self._counts.items() if param in self.state}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("maximize", group["maximize"], (True, False))
        check_choice("param_rounding", group["param_rounding"], ("stochastic", "nearest"))
        check_choice("fused", group["fused"], (None, False, True))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to the step; as in torch, only under ``fused=True``."""
        return all(group["fused"] is True for group in self.param_groups)

    @abstractmethod
    def _kind(self, group: dict[str, Any], precision: StatePrecision, round_param: bool) -> Kind:
        """Return what a step does to the parameters of a group whose states are stored so."""

    @abstractmethod
    def _rates(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return the weight of the gradient in the momentum and the decay of the envelope."""

    @torch.compiler.disable
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self.around_closure is not None and closure is not None:
            self._settle()
            loss = loss_of(self.around_closure(closure))
        else:
            loss = loss_of(closure)
            if self._ballot is not None:
                self._step_by_vote(self._ballot)
                return loss
            self._settle()
        self._take(list(self._params_with_grad()))
        return loss

    def take_step(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        """Take the present step for one parameter, at a position in the optimizer, whose gradient is complete."""
        if self._has_update(param):
            self._take([(index, param, group)])

    def _take(self, updates: Updates) -> None:
        grad_scale, of_scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None:
            _unscale(updates, grad_scale)
        jobs = self._jobs(updates)
        if not jobs:
            return
        batches = dispatch.choose(jobs)
        dispatch.look(batches)
        if of_scaler is not None:
            of_scaler = _over_shards(jobs, of_scaler)
        found_inf = None
        if defers(jobs):
            nonfinite = dispatch.nonfinite_on_device(jobs, batches)
            max_over_shards((job.whole, flag) for job, flag in zip(jobs, nonfinite.unbind(), strict=True))
            check = DeferredCheck(nonfinite, of_scaler)
            self._unsettled, found_inf = (*self._unsettled, (check, updates)), check.found_inf
        elif of_scaler is not None and bool(of_scaler != 0):
            return  # the scaler lowers its scale
        elif not self._are_finite(updates, dispatch.nonfinite_on_host(jobs, batches)):
            return
        self._update(updates, jobs, batches, found_inf)
        self._advance([job.whole for job in jobs], found_inf)

    def _update(
        self, updates: Updates, jobs: Sequence[Job], batches: Sequence[dispatch.Batch], found_inf: Tensor | None
    ) -> None:
        """Change parameters and states, unless ``found_inf`` is not 0; a job belongs to each of the updates."""
        dispatch.run(jobs, batches, found_inf)

    def _gives_signs(self, group: dict[str, Any]) -> bool:
        return self._kind(group, FLOAT32, False).gives_signs

    def _write_signs(self, entries: Sequence[Entry], rooms: Sequence[Tensor], ballot: Ballot) -> None:
        if ballot.noise == 1 or "stochastic" not in self.defaults:
            self._write_updates(entries, rooms, ballot.rank)
            return
        ratios = [torch.zeros_like(room) for room in rooms]
        self._write_updates(entries, ratios, ballot.rank, stochastic=False)
        for entry, room, ratio in zip(entries, rooms, ratios, strict=True):
            # sign(m_t / G_t + c n_t)
            key = noise_key(worker_seed(entry.group, ballot.rank), entry.step, entry.index, Stream.UPDATE)
            n = uniform_noise(key, ratio.numel(), device=ratio.device).view(ratio.shape)
            room.copy_(torch.where(ratio == 0, room, n.mul_(ballot.noise).add_(ratio).sign_()))

    def _write_updates(self, entries: Sequence[Entry], rooms: Sequence[Tensor], rank: int, **options: Any) -> None:
        """Update this worker's states and add its updates at learning rate 1, by changed options of its groups."""
        # The room stands in for the parameter: with learning rate -1 and no decay. So votes need no kernels.
        groups: dict[int, dict[str, Any]] = {}
        updates = [
            (entry.index, entry.param, groups.setdefault(id(entry.group), _of_signs(entry.group, rank) | options))
            for entry in entries
        ]
        self._run([replace(job, whole=room, param=room) for job, room in zip(self._jobs(updates), rooms, strict=True)])

    def _step_together(self, updates: Updates) -> None:
        self._run(self._jobs(updates))
        self._advance([param for _, param, _ in updates])

    def _run(self, jobs: list[Job]) -> None:
        batches = dispatch.choose(jobs)
        dispatch.look(batches, at_gradients=False)
        dispatch.run(jobs, batches)

    def _jobs(self, updates: Updates) -> list[Job]:
        """Return what to do; it changes nothing but creates missing states."""
        numbers: dict[Any, Numbers] = {}
        jobs = []
        for index, param, group in updates:
            of = id(group), param.device
            if of not in numbers:
                numbers[of] = self._numbers(group, param.device)
            jobs.append(self._job(index, param, group, numbers[of]))
        return jobs

    def _numbers(self, group: dict[str, Any], device: torch.device) -> Numbers:
        lr, decay = group["lr"], 1.0
        if isinstance(lr, Tensor):
            lr = lr.to(device).reshape(())
        if group["weight_decay"] != 0:
            decay = 1 - lr * group["weight_decay"]
        return Numbers(lr, decay, *self._rates(group))

    def _job(self, index: int, param: Tensor, group: dict[str, Any], numbers: Numbers) -> Job:
        state, spec = self.state[param], group["state_precision"]
        if (stored_in := self._stored_in.get(param)) is not spec:
            if state and stored_in is not None and stored_in != spec:
                self._refuse_other_storage(param, state, group)
            self._stored_in[param] = spec
        precision = precision_of(state, group)
        if precision is not None and not precision.applies_to(param):
            precision = None
        round_param = param.dtype.itemsize < 4 and group["param_rounding"] == "stochastic"
        kind = self._kind(group, precision or FLOAT32, round_param)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=_count_device(param))
        for name in kind.states:  # one by one: a momentum can be switched on in the middle of a run
            if name not in state:
                init_state(state, name, param, precision)
        seed, step = group.get("seed", 0), self._steps_taken(param) + 1
        keys = {stream: noise_key(seed, step, index, stream) for stream in kind.streams}
        return Job.of(kind, numbers, keys, param, state, group["fused"])

    def _refuse_other_storage(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Raise unless the states, stored already, are stored in the same way under the group's present precision."""
        old, new = self._stored_in[param], group["state_precision"]
        if OVERRIDE in state or _storage(old, param) == _storage(new, param):
            return
        raise ValueError(
            f"state_precision={str(new)!r}: the states of {self._name(param)} are stored in {str(old)!r} already; to "
            "change that in the middle of a run, call lightning_stosign.promote_state(optimizer, param), which moves "
            "them to the next wider storage"
        )

    # What steps parameters while the closure runs: GradientRelease.
    around_closure: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None

    # Where the last step's gradients are still to be reported, and counts of steps that need not be read from a device:
    # param -> (the count, its version, its value).
    _unsettled: tuple[tuple[DeferredCheck, Updates], ...] = ()
    _counts: dict[Tensor, tuple[Tensor, int, int]]
    _stored_in: dict[Tensor, Any]

    def _settle(self) -> None:
        """Raise or warn about the last step's gradients, if the host did not wait for the answer then."""
        unsettled, self._unsettled = self._unsettled, ()
        offending = []
        for check, updates in unsettled:
            taken, flags = check.answer()
            if not taken:
                for _, param, _ in updates:
                    step, version, count = self._counts[param]
                    self._counts[param] = step, version, count - 1
            offending += [update for update, flag in zip(updates, flags, strict=True) if flag]
        if offending:
            self._report_nonfinite([self._name(param) for _, param, _ in offending], [g for _, _, g in offending])

    def _steps_taken(self, param: Tensor) -> int:
        """Return how many steps a parameter has taken; on an accelerator without reading it there, if it is known."""
        step = self.state[param]["step"]
        known, version, count = self._counts.get(param, (None, 0, 0))
        return count if known is not None and known is step and version == known._version else int(step)

    def _advance(self, params: Sequence[Tensor], found_inf: Tensor | None = None) -> None:
        """Count a step, unless it is found that it was not taken."""
        if not params:
            return
        taken = [self._steps_taken(param) for param in params] if self._counts or found_inf is not None else []
        steps = [self.state[param]["step"] for param in params]
        if found_inf is None:
            foreach_add(steps, 1)
        else:
            foreach_add(steps, [(found_inf == 0).to(torch.int64)] * len(steps))
        for param, step, count in zip(params, steps, taken, strict=False):
            self._counts[param] = step, step._version, count + 1


def _of_signs(group: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return a group's options for a stand-in that is to become the update's sign, with noise of the worker's own."""
    return {**group, "lr": -1.0, "weight_decay": 0.0, "param_rounding": "nearest", "seed": worker_seed(group, rank)}


def _count_device(param: Tensor) -> torch.device:
    """Return where a parameter's count of steps is kept: where it is known whether a step was taken."""
    return torch.device("cpu") if param.is_meta else param.device


def _unscale(updates: Updates, grad_scale: Tensor) -> None:
    """Divide gradients by a GradScaler's scale in place, as its ``unscale_`` does."""
    inverses: dict[torch.device, Tensor] = {}
    for _, param, _ in updates:
        grad = local(param.grad)
        if grad.device not in inverses:
            inverses[grad.device] = grad_scale.to(grad.device).double().reciprocal().float()
        grad.mul_(inverses[grad.device])


def _over_shards(jobs: Sequence[Job], found_inf: Tensor) -> Tensor:
    """Return what GradScalers have found on any of the processes that share a parameter."""
    flag = local(found_inf).to(torch.float32).reshape(()).clone()
    sharded = next((job.whole for job in jobs if job.shard is not None), None)
    if sharded is not None:
        max_over_shards([(sharded, flag)])
    return flag


def _storage(spec: Any, param: Tensor) -> StatePrecision | None:
    """Return what of a ``state_precision`` decides how a parameter's states are laid out."""
    precision = None if spec is None else StatePrecision.parse(spec)
    if precision is None or not precision.applies_to(param):
        return None
    if precision.dtype is torch.float32 and param.dtype is not torch.float64:
        return None
    return replace(precision, stochastic_rounding=False, min_numel=0)
