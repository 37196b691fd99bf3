"""A DDP communication hook that sends one bit per gradient coordinate."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from lightning_stosign.strategies.compression import (
    Layout,
    SignCode,
    add_residuals_,
    collect_,
    decode_,
    keep_residuals_,
)
from lightning_stosign.strategies.launch import Launcher, launcher_for
from lightning_stosign.strategies.packing import pack_signs
from lightning_stosign.strategies.voting_round import VotingRound
from lightning_stosign.strategies.wire import Wire

Aggregation = Literal["majority", "mean"]

# DDP's default, 25, is for messages 32 times as long. Nothing overlaps with the last bucket's exchange: small buckets.
BUCKET_CAP_MB = 4.0


class SignExchange:
    """Replaces DDP's all_reduce: signs up, votes counted in equal parts by all workers, their result down.

    Register it with ``ddp_model.register_comm_hook(exchange, sign_hook)``. What a bucket costs is said at
    :class:`VotingRound`; a parameter tensor costs 4 bytes more for its scale.

    Everything but the rank is the same on all workers, and so is the result, bit for bit. It depends on the values of a
    parameter, the step and the seed, not on how DDP groups parameters into buckets.

    Args:
        params: the model's parameters by name; their order numbers them.
        compressed: names of those to compress; the others are averaged in their own precision.
        wire: the connection to the other workers; used by nobody else while a backward pass runs.
        aggregation: ``"majority"`` or ``"mean"``.
        stochastic: stochastic signs, or plain ones.
        error_feedback: add what the signs lost to the next gradient; for plain signs.
        warmup_steps: how many steps go uncompressed before the first compressed one.
        seed: of the noise.

    Raises:
        ValueError: more than 255 workers with ``aggregation="mean"``, whose counts are bytes.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        compressed: set[str],
        wire: Wire,
        *,
        aggregation: Aggregation,
        stochastic: bool,
        error_feedback: bool,
        warmup_steps: int,
        seed: int,
    ) -> None:
        if aggregation == "mean" and wire.workers > 255:
            raise ValueError(f"aggregation='mean' counts the votes of at most 255 workers, got {wire.workers}")
        self.step = 0  # of the last backward pass that exchanged gradients, from 1
        self.wire = wire
        self._names = {param: (index, name) for index, (name, param) in enumerate(params.items())}
        self._compressed = compressed
        self._aggregation = aggregation
        self._code = SignCode(stochastic, seed, wire.rank)
        self._residuals: dict[str, Tensor] | None = {} if error_feedback else None
        self._warmup_steps = warmup_steps
        self._bytes_before = 0
        self._scratch = torch.empty(0, device="cpu")
        self._launcher: Launcher | None = None

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker sent in the last step."""
        return self.wire.bytes_sent - self._bytes_before

    def start(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Start the exchange of a bucket and return the future of its averaged gradients."""
        if bucket.index() == 0:  # DDP's buckets come in order
            self.step += 1
            self._bytes_before = self.wire.bytes_sent
        flat = bucket.buffer()
        layout = self._layout(bucket.parameters())
        if self._launcher is None:
            self._launcher = launcher_for(flat.device)
        return self._launcher.submit(self._job(flat, layout, self.step))

    def close(self) -> None:
        """End the thread and its process group, unless a job is stuck in it."""
        if self._launcher is None:
            return
        idle = self._launcher.close()
        self._launcher = None
        if idle:
            self.wire.close()

    def state_dict(self) -> dict[str, Any]:
        """Return, on rank 0, what a checkpoint needs: the step and all residuals. All workers must call it."""
        state: dict[str, Any] = {"step": self.step}
        if self._residuals is not None:
            gathered = {name: self.wire.gather(mine) for name, mine in sorted(self._residuals.items())}
            state["residuals"] = [
                {name: of_workers[rank].cpu() for name, of_workers in gathered.items() if of_workers}
                for rank in range(self.wire.workers)
            ]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint left off.

        Where the number of workers has changed, each starts from the mean of the saved residuals: that is what all of
        them together still owe to the parameters.
        """
        self.step = state["step"]
        saved = state.get("residuals")
        if self._residuals is None or not saved:
            return
        device = next(iter(self._names)).device
        if len(saved) == self.wire.workers:
            mine = saved[self.wire.rank]
        else:
            mine = {name: torch.stack([of_worker[name] for of_worker in saved]).mean(0) for name in saved[0]}
        self._residuals = {name: residual.to(device, copy=True) for name, residual in mine.items()}

    def _layout(self, params: list[Tensor]) -> Layout:
        layout = Layout(self.wire.workers)
        for param in params:
            index, name = self._names[param]  # type: ignore[index]
            layout.add(name, index, param.numel(), compress=name in self._compressed)
        return layout

    def _job(self, flat: Tensor, layout: Layout, step: int) -> Callable[[], Tensor]:
        def job() -> Tensor:
            try:
                with torch.no_grad():
                    self._exchange(flat, layout, step)
            except RuntimeError as error:
                raise RuntimeError(
                    f"worker {self.wire.rank} of {self.wire.workers} could not exchange the gradients of step {step}: "
                    f"{error}\nAnother worker has probably ended: its own output says why. Training can be resumed "
                    "from the last checkpoint, with the same or another number of workers."
                ) from error
            return flat

        return job

    def _exchange(self, flat: Tensor, layout: Layout, step: int) -> None:
        if step <= self._warmup_steps:
            self.wire.all_reduce_(flat.div_(self.wire.workers))
            return
        voting = VotingRound(self.wire, layout, flat.dtype, flat.device, by_majority=self._aggregation == "majority")
        collect_(voting.exact.view(-1), flat, layout.exact)
        values = self._values(flat, layout)
        scales = self._pack(values, flat, layout, step, out=voting.signs)
        voting.run(lambda out: self._code.tie_breaker(layout, step, out))
        for s in layout.exact:
            s.of_bucket(flat).copy_(s.of(voting.exact.view(-1)))
        decode_(flat, voting.counts(values), layout, scales, voting.voters)

    def _pack(self, values: Tensor, flat: Tensor, layout: Layout, step: int, out: Tensor) -> Tensor:
        """Write this worker's signs.

        Args:
            values: room for the compressed values, shape ``[layout.padded]``.
            flat: the bucket's buffer.
            layout: the bucket's.
            step: the number of the step.
            out: uint8, shape ``[workers, layout.width]``, to write to.

        Returns:
            The scales that all workers share: shape ``[len(layout.compressed)]``.
        """
        if not layout.compressed:
            return values
        code = self._code
        collect_(values, flat, layout.compressed)
        if self._residuals is not None:
            add_residuals_(values, layout, self._residuals)

        scales = code.local_scales(values, layout)
        self.wire.all_reduce_(scales, dist.ReduceOp.MAX if code.stochastic else dist.ReduceOp.SUM)
        if not code.stochastic:
            scales.div_(self.wire.workers)

        code.perturb_(values, layout, scales, step)
        zero_is_positive = code.zero_is_positive(step)
        pack_signs(values.view(self.wire.workers, -1), zero_is_positive=zero_is_positive, out=out)
        if self._residuals is not None:
            keep_residuals_(values, layout, scales, self._residuals, zero_is_positive=zero_is_positive)
        return scales

    def _values(self, flat: Tensor, layout: Layout) -> Tensor:
        """Return room for the compressed values. Kept from bucket to bucket: new memory costs more than the packing."""
        dtype = torch.promote_types(flat.dtype, torch.float32)
        scratch = self._scratch
        if scratch.numel() < layout.padded or scratch.dtype != dtype or scratch.device != flat.device:
            self._scratch = torch.empty(layout.padded, dtype=dtype, device=flat.device)
        return self._scratch[: layout.padded]


def sign_hook(state: SignExchange, bucket: dist.GradBucket) -> Future[Tensor]:
    """The communication hook; ``state`` does the work."""
    return state.start(bucket)
