"""SignDDPStrategy: data-parallel training that sends one bit per coordinate."""

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch.distributed as dist
from fsspec.core import url_to_fs
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_stosign._lightning_names import adopt, under_both_names
from lightning_stosign._plain import plain
from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.base import check_choice, check_number
from lightning_stosign.optim.voting import VotingOptimizer
from lightning_stosign.strategies.exchange import BUCKET_CAP_MB, Aggregation, SignExchange, sign_hook
from lightning_stosign.strategies.own_states import gather, load_mean, load_own, nbytes, own_states
from lightning_stosign.strategies.update_votes import UpdateBallot
from lightning_stosign.strategies.wire import Wire

CHECKPOINT_KEY = "SignDDPStrategy"
BYTES_TAG = "sign_ddp/bytes_sent"
AGREEMENT_TAG = "sign_ddp/agreement"
VECTORS = "1d"
OWN_SUFFIX = ".workers"
GATHERED_BYTES = 1 << 30  # states of all workers that go into one file

SignsOf = Literal["updates", "gradients"]

# What DDP's reducer is told, which has nothing to do when workers vote on updates.
_REDUCER_OPTIONS = ("bucket_cap_mb", "find_unused_parameters", "gradient_as_bucket_view", "static_graph")


@under_both_names
class SignDDPStrategy(DDPStrategy):
    r"""DDP that sends one bit per coordinate: about 30 times less traffic.

    **Votes on updates** (``signs_of="updates"``, for :class:`StoSignSGD`, :class:`SignSGD` and
    :class:`SignConverted`): no gradient is exchanged. Each worker keeps the momentum :math:`m_w` and the envelope
    :math:`G_w` of its own gradient and sends the sign of its own update, :math:`\mathrm{sign}(m_w + G_w n_w)` with
    noise of its own. All workers step by the majority's sign, or by the mean of the signs:

    .. math::
        x_{t+1} = x_t - \eta \, \mathrm{vote}_w(\mathrm{sign}(m_w + G_w n_w)) - \eta \lambda x_t

    Parameters stay bit-identical on all workers while momenta differ. With one worker it is the optimizer without a
    strategy, bit for bit. Schedules, param groups, weight decay, FP8 states, bfloat16 parameters, gradient
    accumulation, manual optimization and several optimizers work as usual, and any parameter may go unused on any
    worker. Four things differ from DDP:

    * Gradient clipping clips each worker's own gradient, which is noisier, and so longer, than the mean gradient.
    * The envelope of one worker's gradient is larger than the mean gradient's, so ``"mean"`` moves less at the same
      learning rate: start from DDP's rate times the square root of the number of workers, and for ``"majority"`` from
      DDP's rate.
    * A gradient that is not finite on one worker skips, or ends, the step on all of them (``on_nonfinite``).
    * ``precision="16-mixed"`` is refused: each worker's GradScaler would judge by its own gradients.

    A checkpoint holds the states of all workers; with another number of workers, each resumes from their mean.

    **Votes on gradients** (``signs_of="gradients"``, for any optimizer): the averaged gradients that the optimizer
    sees are made of signs. With the scale :math:`s` of a parameter, which all workers share, and the worker's gradient
    :math:`v_w`, the gradient is :math:`s \cdot \mathrm{vote}_w(\mathrm{sign}(v_w + s\,n_w))`, where :math:`s` is the
    largest :math:`|v_w|` of all workers and :math:`n_w \sim \mathrm{Unif}(-1, 1)`. With plain signs there is no
    :math:`n_w`, and :math:`s` is the mean :math:`|v_w|`. A coordinate is compared with its whole parameter's largest
    entry, so these signs say much less than those of updates. The average of signs is longer than the gradient: clip by
    a norm that fits, or by none.

    * ``"mean"``, stochastic: an unbiased estimate of the mean gradient.
    * ``"majority"``, plain: SignSGD with majority vote, with ``SignSGD(momentum=0)``.
    * plain signs with error feedback, ``"mean"``: EF-SignSGD.

    Either way each worker sends one bit per coordinate, counts the votes on an equal part of the coordinates and sends
    the result to all: one bit again for ``"majority"``, the number of votes for ``"mean"`` (1.6 bits with 2 workers,
    2.67 with 4, 3.2 with 8). Ties fall to either side, by a coin that all workers share. All noise is a pure function
    of (seed, rank, step, parameter, coordinate).

    The default compresses all but biases and norms: vectors are 0.3% of a GPT's values, so that sending them in full
    costs a tenth of what the signs cost. One bit cannot say zero: leave out layers where that matters, such as
    embeddings of rare tokens.

    Logs ``sign_ddp/bytes_sent``: the bytes that this worker sent for the step. With ``log_agreement``, logs
    ``sign_ddp/agreement``: the share of coordinates whose updates have the same sign on all ``W`` workers. Independent
    coins agree on 2 ** (1 - W) of them; the closer to that, the less the gradients of a step say, and the more a
    further worker helps. Near 1, more workers have stopped helping.

    Args:
        aggregation: ``"majority"`` or ``"mean"``.
        signs_of: what workers vote on: their ``"updates"`` or their ``"gradients"``.
        stochastic: whether the signs of gradients are stochastic. Signs of updates are as the optimizer makes them.
        error_feedback: add what a worker's signs of gradients lost to its next gradient. Needs ``stochastic=False``:
            the error of a stochastic sign is larger than what it compresses, and would grow without bound. What a
            majority vote loses beyond that is not fed back. Each worker's residual is saved in the checkpoint: 4 bytes
            per parameter and worker.
        uncompressed: what is averaged in full precision: globs on parameter names, and ``"1d"`` for all parameters of
            fewer than two dimensions.
        warmup_steps: number of steps that average all gradients in full precision before the first vote, >= 0.
        log_agreement: measure and log the workers' agreement on updates. Costs one short message per step.
        noise: the range :math:`c` of the noise in signs of updates, relative to the envelope: the sign is
            :math:`\mathrm{sign}(m_w + c\, G_w n_w)`. In (0, 1]: 1 is unbiased; less moves further, and on average as
            far for all :math:`|m_w| \ge c\, G_w`. Many workers average noise out, so that each needs less; try
            ``workers ** -0.5``. No effect on one worker.
        seed: of the noise in signs of gradients and in ties, in [0, 2**64).
        **ddp_kwargs: for ``DDPStrategy``, e.g. ``timeout``. With votes on updates those of DDP's reducer
            (``find_unused_parameters``, ``static_graph``, ...) have no effect. With votes on gradients
            ``bucket_cap_mb`` is 4 by default: smaller buckets let more of the exchange overlap with backward.

    Raises:
        ValueError: an argument is out of range; error feedback with stochastic signs or with updates; a communication
            hook is given; the model has no parameter to compress; an optimizer's update is not a sign, or the precision
            has a GradScaler, with ``signs_of="updates"``.
        TypeError: an argument is of the wrong type.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = SignDDPStrategy(aggregation="mean", uncompressed=["1d", "*embedding*"], warmup_steps=100)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)

    Source:
        Bernstein et al., "signSGD with Majority Vote", arXiv 1810.05291; Liu et al., "Communication Efficient
        Distributed Training with Distributed Lion", arXiv 2404.00438; Jin et al., "Stochastic-Sign SGD", arXiv
        2002.10940; Safaryan & Richtarik, arXiv 1905.12938; Karimireddy et al., "Error Feedback Fixes SignSGD",
        arXiv 1901.09847.
    """

    def __init__(
        self,
        aggregation: Aggregation = "majority",
        *,
        signs_of: SignsOf = "updates",
        stochastic: bool = True,
        error_feedback: bool = False,
        uncompressed: Sequence[str] = (VECTORS,),
        warmup_steps: int = 0,
        log_agreement: bool = False,
        noise: float = 1.0,
        seed: int = 0,
        **ddp_kwargs: Any,
    ) -> None:
        check_choice("aggregation", aggregation, get_args(Aggregation))
        check_choice("signs_of", signs_of, get_args(SignsOf))
        stochastic, error_feedback, log_agreement = plain((stochastic, error_feedback, log_agreement))
        warmup_steps, seed = plain((warmup_steps, seed))
        check_choice("stochastic", stochastic, (True, False))
        check_choice("error_feedback", error_feedback, (True, False))
        check_choice("log_agreement", log_agreement, (True, False))
        if log_agreement and signs_of == "gradients":
            raise ValueError("log_agreement=True needs signs_of='updates'")
        if signs_of == "updates" and (error_feedback or not stochastic):
            option = f"error_feedback={error_feedback}" if error_feedback else f"stochastic={stochastic}"
            raise ValueError(
                f"{option} needs signs_of='gradients': the signs of updates are made by the optimizer, which keeps "
                "what they leave out in its momentum"
            )
        check_number("noise", noise, 0.0, 1.0)
        if noise == 0:
            raise ValueError("noise=0 must be in (0, 1]; for plain signs use SignSGD")
        if noise != 1 and signs_of == "gradients":
            raise ValueError(f"noise={noise} needs signs_of='updates'")
        if error_feedback and stochastic:
            raise ValueError(
                "error_feedback=True needs stochastic=False: the error of a stochastic sign is larger than what it "
                "compresses, and fed back it grows without bound"
            )
        _check_int("warmup_steps", warmup_steps, 1 << 63)
        _check_int("seed", seed, 1 << 64)
        if isinstance(uncompressed, str):
            raise TypeError(f"uncompressed must be a list of globs, got {uncompressed!r}: write [{uncompressed!r}]")
        if not all(isinstance(glob, str) for glob in uncompressed):
            raise TypeError(f"uncompressed must be a list of globs, got {uncompressed!r}")
        # LightningCLI fills in all options of DDPStrategy and DDP, None among them.
        ddp_kwargs = {name: value for name, value in ddp_kwargs.items() if value is not None}
        if hook := {"ddp_comm_hook", "ddp_comm_wrapper", "ddp_comm_state"} & ddp_kwargs.keys():
            raise ValueError(
                f"{', '.join(sorted(hook))}: SignDDPStrategy is a communication hook itself; use DDPStrategy"
            )
        if signs_of == "gradients":
            ddp_kwargs.setdefault("bucket_cap_mb", BUCKET_CAP_MB)
        elif idle := [option for option in _REDUCER_OPTIONS if ddp_kwargs.get(option)]:
            rank_zero_warn(
                f"SignDDPStrategy: {', '.join(f'{option}={ddp_kwargs.pop(option)}' for option in idle)} has no effect "
                "with signs_of='updates', where DDP's reducer has nothing to do."
            )
        super().__init__(**ddp_kwargs)
        self.aggregation = aggregation
        self.signs_of = signs_of
        self.stochastic = stochastic
        self.error_feedback = error_feedback
        self.uncompressed = tuple(uncompressed)
        self.warmup_steps = warmup_steps
        self.log_agreement = log_agreement
        self.noise = noise
        self.seed = seed
        self._exchange: SignExchange | None = None
        self._frozen: dict[Tensor, str] = {}  # when DDP wrapped the model: its reducer does not know them
        self._ballots: list[UpdateBallot] = []
        self._restored: Mapping[str, Any] | None = None
        self._restored_from: Any = None

    def _configure_launcher(self) -> None:
        # From here on DDPStrategy's own code is that of the Trainer's name: it asks for a LightningModule of its own.
        adopt(self, self.accelerator)
        super()._configure_launcher()

    def setup_distributed(self) -> None:
        """Connect the workers."""
        ours = not dist.is_initialized()
        super().setup_distributed()
        if ours:
            # Lightning does so for NCCL only. Left to the interpreter's end, gloo's threads now and then abort it.
            atexit.register(_destroy_process_group)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        wrapped = super()._setup_model(model)
        if self.signs_of == "updates":
            wrapped.register_forward_pre_hook(_leave_gradients_alone)
        return wrapped

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare DDP's reducer in manual optimization, if gradients are exchanged."""
        if self.signs_of == "gradients":
            super().pre_backward(closure_loss)

    def _register_ddp_hooks(self) -> None:
        # DDPStrategy would leave a hook out on the CPU.
        assert isinstance(self.model, DistributedDataParallel)
        params = dict(self.model.module.named_parameters())
        compressed = {name for name, param in params.items() if param.requires_grad and not self._is_exact(name, param)}
        self._check_compressed(params, compressed)
        if self.signs_of == "updates":
            return
        self._frozen = {param: name for name, param in params.items() if not param.requires_grad}
        self._exchange = SignExchange(
            params,
            compressed,
            self._connect(),
            aggregation=self.aggregation,
            stochastic=self.stochastic,
            error_feedback=self.error_feedback,
            warmup_steps=self.warmup_steps,
            seed=self.seed,
        )
        if self._restored is not None:
            self._exchange.load_state_dict(self._restored)
            self._restored = None
        self.model.register_comm_hook(self._exchange, sign_hook)

    def _connect(self) -> Wire:
        # On the CPU a group of its own: a thread uses it while DDP and Lightning may use the default one.
        return Wire(dist.new_group(timeout=self._timeout) if self.root_device.type == "cpu" else None)

    def setup_optimizers(self, trainer: Any) -> None:
        """Create the optimizers and, for votes on updates, connect each of them to the other workers.

        Raises:
            ValueError: an optimizer's update is not a sign; a GradScaler is in use; with votes on gradients, an
                optimizer evaluates its closure more than once per step.
        """
        super().setup_optimizers(trainer)
        if self.signs_of == "gradients":
            for optimizer in self.optimizers:
                _refuse_if_it_compares_gradients(optimizer)
            return
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "SignDDPStrategy(signs_of='updates') does not run with a GradScaler: each worker's would judge by its "
                "own gradients. Use precision='bf16-mixed', or signs_of='gradients'"
            )
        voting = [optimizer for optimizer in self.optimizers if isinstance(optimizer, VotingOptimizer)]
        for optimizer in self.optimizers:
            if optimizer not in voting:
                raise ValueError(
                    f"SignDDPStrategy(signs_of='updates') needs optimizers whose update is a sign: StoSignSGD, "
                    f"SignSGD or SignConverted of another one, got {type(optimizer).__name__}. Use "
                    "SignDDPStrategy(signs_of='gradients') with it"
                )
        for optimizer in voting:
            optimizer.vote_by(None)  # raises if its options make its update no sign
            if self.noise != 1 and "stochastic" not in cast("Optimizer", optimizer).defaults:
                rank_zero_warn(f"SignDDPStrategy: noise={self.noise} has no effect on {type(optimizer).__name__}.")
        if self.world_size == 1:
            return
        assert isinstance(self.model, DistributedDataParallel)
        names = {param: name for name, param in self.model.module.named_parameters()}
        wire = self._connect()
        self._ballots = [
            UpdateBallot(
                lambda param: not self._is_exact(names.get(param, ""), param),
                wire,
                by_majority=self.aggregation == "majority",
                seed=self.seed,
                warmup_steps=self.warmup_steps,
                watch=self.log_agreement,
                noise=self.noise,
            )
            for _ in voting
        ]
        for optimizer, ballot in zip(voting, self._ballots, strict=True):
            optimizer.vote_by(ballot)

    def _is_exact(self, name: str, param: Tensor) -> bool:
        return any(param.ndim < 2 if glob == VECTORS else fnmatchcase(name, glob) for glob in self.uncompressed)

    def _check_compressed(self, params: Mapping[str, nn.Parameter], compressed: set[str]) -> None:
        if not compressed:
            raise ValueError(
                f"SignDDPStrategy has nothing to compress: uncompressed={list(self.uncompressed)} leaves out all "
                f"{len(params)} parameters of the model"
            )
        idle = [g for g in self.uncompressed if g != VECTORS and not any(fnmatchcase(name, g) for name in params)]
        if idle:
            rank_zero_warn(f"SignDDPStrategy: no parameter matches uncompressed={idle}.")
        numel = sum(param.numel() for param in params.values() if param.requires_grad)
        share = sum(params[name].numel() for name in compressed) / numel
        rank_zero_info(
            f"SignDDPStrategy: {len(compressed)} of {len(params)} parameters, {share:.1%} of the values, go as signs "
            f"(aggregation={self.aggregation!r}, warmup_steps={self.warmup_steps})"
        )

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Perform the optimizer step, and log how many bytes it sent.

        Raises:
            RuntimeError: with votes on gradients, a parameter was frozen when DDP wrapped the model and no longer is.
        """
        self._refuse_unfrozen(optimizer)
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        ballot = next((b for ours, b in zip(self.optimizers, self._ballots, strict=False) if ours is optimizer), None)
        exchange = self._exchange or ballot
        if exchange is not None and self.lightning_module is not None:
            self.lightning_module.log(BYTES_TAG, float(exchange.bytes_sent))
            if ballot is not None and self.log_agreement:
                self.lightning_module.log(AGREEMENT_TAG, ballot.agreement())
        return output

    def _refuse_unfrozen(self, optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]] if self._frozen else []
        unfrozen = [self._frozen[param] for param in params if param.requires_grad and param in self._frozen]
        if unfrozen:
            raise RuntimeError(
                f"SignDDPStrategy(signs_of='gradients'): {', '.join(unfrozen)} had requires_grad=False when DDP "
                "wrapped the model, so workers do not exchange the gradients and would drift apart. Use "
                "signs_of='updates', or freeze parameters only after the fit has begun"
            )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without an exchange.

        Raises:
            ValueError: with votes on gradients and ``static_graph=True``, for which torch's DDP fails.
        """
        if self.signs_of == "gradients" and self._ddp_kwargs.get("static_graph"):
            raise ValueError(
                "SignDDPStrategy(signs_of='gradients', static_graph=True) cannot accumulate gradients: torch's DDP "
                "fails. Leave out static_graph=True, or use accumulate_grad_batches=1"
            )
        with super().block_backward_sync():
            yield

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint with the count of steps and what differs between workers: their states or residuals.

        All workers must call it. States of 1 GB and more are not gathered: each worker writes its own to
        ``<filepath>.workers/<rank>.ckpt``.
        """
        if "optimizer_states" in checkpoint:  # not if only the weights are wanted
            if self._exchange is not None:
                checkpoint[CHECKPOINT_KEY] = self._exchange.state_dict()
            elif self._ballots:
                checkpoint[CHECKPOINT_KEY] = self._votes_state_dict(filepath)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _votes_state_dict(self, filepath: Any) -> dict[str, Any]:
        own = [
            own_states(optimizer, ballot.is_voted)
            for optimizer, ballot in zip(self.optimizers, self._ballots, strict=True)
        ]
        state: dict[str, Any] = {"steps": [ballot.step for ballot in self._ballots], "workers": self.world_size}
        if sum(nbytes(states) for states in own) * self.world_size < GATHERED_BYTES:
            wire = self._ballots[0].wire
            gathered = [gather(states, wire) for states in own]
            state["states"] = [list(of_worker) for of_worker in zip(*gathered, strict=True)]
        else:
            on_cpu = [{i: {n: v.cpu() for n, v in entry.items()} for i, entry in states.items()} for states in own]
            self.checkpoint_io.save_checkpoint({"states": on_cpu}, _own_path(filepath, self.global_rank))
            self.barrier()
        return state

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; a run that resumes from it continues each worker's states or residuals."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.get(CHECKPOINT_KEY)
        self._restored_from = checkpoint_path
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states: this worker's own, or the mean of all if the number of workers has changed."""
        super().load_optimizer_state_dict(checkpoint)
        saved, self._restored = self._restored, None
        if saved is None or "steps" not in saved or self.signs_of == "gradients":
            return
        for ballot, step in zip(self._ballots, saved["steps"], strict=False):
            ballot.step = step
        workers = saved["workers"]
        ranks = [self.global_rank] if workers == self.world_size else list(range(workers))
        states = [
            saved["states"][rank]
            if "states" in saved
            else self.checkpoint_io.load_checkpoint(_own_path(self._restored_from, rank))["states"]
            for rank in ranks
        ]
        for optimizer, *of_workers in zip(self.optimizers, *states, strict=True):
            if workers == self.world_size:
                load_own(optimizer, of_workers[0])
            else:
                load_mean(optimizer, of_workers)
        if workers != self.world_size:
            rank_zero_info(
                f"SignDDPStrategy: the checkpoint is of {workers} workers, this run has {self.world_size}: each starts "
                "from the mean of their momenta"
            )

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint and the workers' own files beside it."""
        super().remove_checkpoint(filepath)
        folder = f"{filepath}{OWN_SUFFIX}"
        filesystem, path = url_to_fs(str(folder))
        if self.is_global_zero and filesystem.exists(path):
            self.checkpoint_io.remove_checkpoint(folder)

    def teardown(self) -> None:
        """End the exchange, whose state may still be saved, and unwrap the model."""
        if self._exchange is not None:
            self._exchange.close()
        if self._ballots and all([ballot.close() for ballot in self._ballots]):
            self._ballots[0].wire.close()
        self._restored = None  # a checkpoint that was only tested must not reach the next fit
        super().teardown()


def _leave_gradients_alone(ddp: nn.Module, args: Any) -> None:
    """Keep DDP's reducer idle, before each forward; buffers stay those of worker 0, as in DDP."""
    ddp.require_backward_grad_sync = False  # type: ignore[assignment]
    ddp.require_forward_param_sync = True  # type: ignore[assignment]


def _own_path(filepath: Any, rank: int) -> str:
    return f"{filepath}{OWN_SUFFIX}/{rank}.ckpt"


def _refuse_if_it_compares_gradients(optimizer: Optimizer) -> None:
    """Raise for an optimizer that takes the difference of two gradients of one step for the loss's curvature."""
    same_batch = isinstance(optimizer, ALIAS) and optimizer.defaults["same_batch"]
    if same_batch or isinstance(optimizer, LBFGS):
        raise ValueError(
            f"SignDDPStrategy(signs_of='gradients') does not run with {type(optimizer).__name__}, which compares "
            "several gradients of a step: the signs' noise would look like curvature. Use strategy='ddp' with it"
        )


def _check_int(name: str, value: Any, below: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if not 0 <= value < below:
        raise ValueError(f"{name}={value} must be at least 0 and less than 2**{below.bit_length() - 1}")


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
