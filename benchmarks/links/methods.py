"""The ways to average gradients that are compared, and one worker's training of a GPT by one of them."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from gpt import GPT, SIZES  # noqa: E402
from text_data import BYTES, TextDataModule, inputs_and_targets  # noqa: E402

from lightning_stosign import StoSignSGD  # noqa: E402
from lightning_stosign.strategies.exchange import BUCKET_CAP_MB, Aggregation, SignExchange, sign_hook  # noqa: E402
from lightning_stosign.strategies.launch import ThreadLauncher  # noqa: E402
from lightning_stosign.strategies.update_votes import UpdateBallot  # noqa: E402
from lightning_stosign.strategies.wire import Wire  # noqa: E402

BASELINE = "DDP float32"
CONTEXT = 128
CLIP = 1.0  # the gradient's norm: the average gradient's, or each worker's own where workers vote on updates
POWER_SGD_STARTS = 2  # steps that torch's hook wants before it compresses; they cost what the baseline's cost
Size = Literal["1m", "10m"]


Register = Callable[[DistributedDataParallel], UpdateBallot | None]


def sign(aggregation: Aggregation, *, stochastic: bool) -> Register:
    """Return what puts SignDDPStrategy's exchange of gradients' signs into a DDP model."""

    def register(ddp: DistributedDataParallel) -> None:
        params = dict(ddp.module.named_parameters())
        exchange = SignExchange(
            params,
            {name for name, param in params.items() if param.ndim > 1},
            Wire(dist.new_group()),
            aggregation=aggregation,
            stochastic=stochastic,
            error_feedback=False,
            warmup_steps=0,
            seed=0,
        )
        ddp.register_comm_hook(exchange, sign_hook)

    return register


def votes(aggregation: Aggregation, *, overlap: bool = True) -> Register:
    """Return what lets workers vote on their updates, as SignDDPStrategy does by default."""

    def register(ddp: DistributedDataParallel) -> UpdateBallot:
        ddp.require_backward_grad_sync = False
        return ballot(aggregation, Wire(dist.new_group()), UpdateBallot if overlap else OneByOne)

    return register


def ballot(aggregation: Aggregation, wire: Wire, cls: type[UpdateBallot] = UpdateBallot) -> UpdateBallot:
    """Return SignDDPStrategy's connection of workers that vote on updates."""
    by_majority = aggregation == "majority"
    return cls(lambda param: param.ndim > 1, wire, by_majority=by_majority, seed=0, warmup_steps=0)


class OneByOne(UpdateBallot):
    """Waits for the votes on a bucket before the next one's are cast."""

    def submit(self, job: Callable[[], Tensor], device: torch.device) -> Future[Tensor]:
        done = super().submit(job, device)
        done.wait()
        return done


def power_sgd(rank: int) -> Register:
    """Return what puts torch's PowerSGD of a rank into a DDP model."""

    def register(ddp: DistributedDataParallel) -> None:
        # Its later collectives start as its earlier ones end, so that gloo mixes up those of two buckets: one by one.
        launcher = ThreadLauncher()

        def in_order(state: powerSGD_hook.PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
            return launcher.submit(lambda: powerSGD_hook.powerSGD_hook(state, bucket).wait())

        state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=POWER_SGD_STARTS)
        ddp.register_comm_hook(state, in_order)

    return register


def bfloat16_hook(state: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
    """Be torch's hook under another name: by its own, DDP refuses it without NCCL, though gloo can sum bfloat16."""
    return default_hooks.bf16_compress_hook(state, bucket)


METHODS: dict[str, Register] = {
    BASELINE: lambda ddp: None,
    "float16 hook": lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "bfloat16 hook": lambda ddp: ddp.register_comm_hook(dist.group.WORLD, bfloat16_hook),
    "PowerSGD rank 1": power_sgd(1),
    "PowerSGD rank 4": power_sgd(4),
    "votes mean": votes("mean"),
    "votes majority": votes("majority"),
    "sign mean": sign("mean", stochastic=True),
    "sign majority": sign("majority", stochastic=True),
    "sign majority, plain": sign("majority", stochastic=False),
}
# Those, and what only takes another time.
TIMED = METHODS | {"votes majority, no overlap": votes("majority", overlap=False)}
# What a run in one process can stand in for.
VOTES: dict[str, Aggregation] = {"votes mean": "mean", "votes majority": "majority"}


def gpt(size: Size, seed: int) -> GPT:
    """Return a GPT with the weights of a seed."""
    torch.manual_seed(seed)
    return GPT(BYTES, CONTEXT, *SIZES[size])


class Worker:
    """One worker's training of a GPT with StoSignSGD.

    Args:
        model: the GPT.
        ballot: lets the workers vote on updates; None: they do not.
        rank: this worker's.
        workers: their number.
        batch_size: windows per worker and step.
        context: tokens in a window.
        lr: of StoSignSGD.
        seed: of the noise and the order of the data.
        clip: largest norm of this worker's gradient; None: any.
    """

    def __init__(
        self,
        model: GPT | DistributedDataParallel,
        ballot: UpdateBallot | None,
        rank: int,
        workers: int,
        *,
        batch_size: int,
        context: int = CONTEXT,
        lr: float = 2e-3,
        seed: int = 0,
        clip: float | None = CLIP,
    ) -> None:
        self.model, self.ballot, self.batch_size, self.clip = model, ballot, batch_size, clip
        self.optimizer = StoSignSGD(model.parameters(), lr=lr, seed=seed)
        data = TextDataModule(context=context, seed=seed)
        data.setup("fit")
        self.windows, self.held_out = data.train_windows, data.val_windows
        self.numbers = count(rank, workers)

    def train(self, steps: int, lr: float) -> None:
        """Take steps with a linear warm-up to the learning rate over a tenth of them and linear decay to a tenth."""
        for step in range(steps):
            self.optimizer.param_groups[0]["lr"] = lr * min(10 * (step + 1) / steps, 1 - 0.9 * step / steps)
            self.step()

    def step(self, *, communicate: bool = True) -> float:
        """Take a step and return the seconds it took."""
        start = next(self.numbers) * self.batch_size
        batch = inputs_and_targets(self.windows.__getitems__(list(range(start, start + self.batch_size))))
        self.optimizer.vote_by(self.ballot if communicate else None)
        began = time.perf_counter()
        with (
            self.model.no_sync()
            if isinstance(self.model, DistributedDataParallel) and not communicate
            else nullcontext()
        ):
            self.loss(batch).backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validation_loss(self, windows: int) -> float:
        tokens, targets = inputs_and_targets(self.held_out.__getitems__(list(range(windows))))
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten()).item()


class Run(Worker):
    """One of several processes that train together by one method.

    Args:
        method: a name of :data:`TIMED`.
        size: of the GPT.
        batch_size: windows per worker and step.
        context: tokens in a window.
        lr: of StoSignSGD.
        seed: of the weights, the noise and the order of the data.
    """

    def __init__(
        self, method: str, size: Size, batch_size: int, context: int = CONTEXT, lr: float = 2e-3, seed: int = 0
    ) -> None:
        bucket_cap_mb = BUCKET_CAP_MB if method.startswith("sign") else None  # SignDDPStrategy's and DDP's default
        model = DistributedDataParallel(gpt(size, seed), bucket_cap_mb=bucket_cap_mb)
        super().__init__(
            model,
            TIMED[method](model),
            dist.get_rank(),
            dist.get_world_size(),
            batch_size=batch_size,
            context=context,
            lr=lr,
            seed=seed,
            # Signs of gradients are averaged to something much longer than the gradient.
            clip=None if method.startswith("sign") else CLIP,
        )

    def replicas_are_identical(self) -> bool:
        """Whether all workers have the same weights, bit for bit."""
        bits = torch.cat([param.detach().view(torch.int32).flatten() for param in self.model.parameters()])
        first = bits.clone()
        dist.broadcast(first, 0)
        same = torch.tensor(float(torch.equal(bits, first)))
        dist.all_reduce(same, dist.ReduceOp.MIN)
        return bool(same)
