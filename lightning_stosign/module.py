"""StoSignMixin: one base class more, and a LightningModule trains with StoSignSGD or what it is compared with."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stosign._gradient_release import refuse_unless_releasable
from lightning_stosign._lightning_names import is_a
from lightning_stosign._plain import make_fields_plain
from lightning_stosign._training_follower import follow_training
from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.base import check_choice, check_number
from lightning_stosign.optim.emulation import emulate_state_precision
from lightning_stosign.optim.gradient_release import GradientRelease
from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.resuming import resume_with
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.states.state_precision import StatePrecision
from lightning_stosign.optim.stosign import StoSignSGD
from lightning_stosign.optim.wrappers.muon_sign import MuonSign
from lightning_stosign.optim.wrappers.sign_converted import SignConverted
from lightning_stosign.schedule import ScheduleToTheEnd, lr_factor, warn_if_time_may_cut_it

__all__ = ["StoSignConfig", "StoSignMixin", "lr_factor"]

OptimizerName = Literal[
    "stosign", "signsgd", "adamw", "lion", "muon", "muon-sign", "sign-adamw", "sign-adamax", "alias"
]
Schedule = Literal["cosine", "linear", "constant", "wsd"]

_DEFAULT_BETAS: dict[str, tuple[float, float]] = {
    "stosign": (0.9, 1.0),
    "signsgd": (0.9, 0.0),
    "adamw": (0.9, 0.95),
    "lion": (0.9, 0.99),
    "muon": (0.9, 0.95),
    "muon-sign": (0.9, 1.0),
    "sign-adamw": (0.9, 0.95),
    "sign-adamax": (0.9, 0.999),
    "alias": (0.9, 0.999),
}

# Each parameter is updated by its own gradient and states alone.
_RELEASING = ("stosign", "signsgd", "muon-sign")

# What the fields that keep_on_resume may name are called in optimizers' param groups.
_OPTIONS_OF_FIELDS = {
    "betas": ("betas", "momentum", "beta2"),
    **{name: (name,) for name in ("lr", "weight_decay", "stochastic", "seed", "state_precision")},
    **{name: (name,) for name in ("param_rounding", "on_nonfinite")},
}

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class StoSignConfig:
    """Everything :class:`StoSignMixin` needs to build an optimizer and its schedule.

    Args:
        optimizer: ``"stosign"`` (:class:`StoSignSGD`), ``"signsgd"`` (:class:`SignSGD`), ``"adamw"`` (torch),
            ``"lion"`` (pytorch_optimizer), ``"muon"`` (torch's Muon for the matrices, AdamW for the rest),
            ``"muon-sign"`` (:class:`MuonSign`: Muon for the matrices, StoSignSGD in expectation for the rest),
            ``"sign-adamw"``, ``"sign-adamax"`` (:class:`SignConverted` of torch's AdamW and, Algorithm 9, Adamax),
            ``"alias"`` (:class:`ALIAS`, Adam-style: finds its own step size, of which the schedule is a factor).
        lr: peak learning rate, >= 0. Not used by alias.
        betas: the optimizer's betas. None: ``(0.9, 1.0)`` for stosign and muon-sign, ``(0.9, 0.95)`` for adamw, muon
            and sign-adamw, ``(0.9, 0.99)`` for lion, ``(0.9, 0.999)`` for sign-adamax and alias; of signsgd's, 0.9,
            only the first is used.
        weight_decay: decoupled weight decay of the parameters that ``no_decay`` does not exempt, >= 0.
        no_decay: what is exempt: the kinds ``"bias"``, ``"norm"`` and ``"embedding"``, and globs on parameter names.
        warmup_steps: optimizer steps over which lr rises linearly from lr / warmup_steps, >= 0.
        schedule: what follows until the trainer's last step: ``"cosine"`` or ``"linear"`` to lr * min_lr_ratio;
            ``"constant"``; ``"wsd"``: constant, then linear over the last ``wsd_decay_ratio`` of all steps.
        min_lr_ratio: the last learning rate as a share of the peak, in [0, 1].
        wsd_decay_ratio: the length of wsd's decay as a share of all steps, in (0, 1].
        state_precision: how the optimizer states are stored: a :class:`StatePrecision` or its name. Optimizers that
            cannot store them so get :func:`emulate_state_precision`. None: in full precision.
        stochastic: False gives the in-expectation form of stosign, sign-adamw, sign-adamax and muon-sign's rest. None:
            False for muon-sign, True for the others.
        seed: of their noise.
        param_rounding: how stosign, signsgd and muon-sign round bfloat16 and float16 parameters after their update in
            float32: ``"stochastic"``, so that a step below half of their spacing is kept on average, or ``"nearest"``.
        on_nonfinite: what this package's optimizers do about a gradient with inf or NaN: ``"raise"`` or ``"skip"``.
        release_gradients: update each parameter during backward, as soon as its gradient is complete, and free the
            gradient: that saves the memory of all gradients but one, and the weights have the same bits. For stosign,
            signsgd and muon-sign, on one device, without accumulation, clipping or a GradScaler. A gradient with inf or
            NaN is found only after other parameters have been updated, so ``on_nonfinite`` must be ``"raise"``. What
            looks at gradients after backward (loggers, monitors) finds none.
        keep_on_resume: names of options above whose new values are to be kept where a checkpoint has others, e.g.
            ``("lr", "state_precision")``; see :func:`resume_with`. The others are the checkpoint's, with a warning.
        convert_on_resume: convert the state of another optimizer, such as AdamW's, where possible, instead of refusing
            it; see :func:`resume_with`.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.

    Example:
        >>> StoSignConfig(lr=2e-3, warmup_steps=100, state_precision="fp8").schedule
        'cosine'
    """

    optimizer: OptimizerName = "stosign"
    lr: float = 1e-3
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("bias", "norm", "embedding")
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    min_lr_ratio: float = 0.1
    wsd_decay_ratio: float = 0.2
    state_precision: StatePrecision | str | None = None
    stochastic: bool | None = None
    seed: int = 0
    param_rounding: Literal["stochastic", "nearest"] = "stochastic"
    on_nonfinite: Literal["raise", "skip"] = "raise"
    release_gradients: bool = False
    keep_on_resume: tuple[str, ...] = ()
    convert_on_resume: bool = False

    def __post_init__(self) -> None:
        make_fields_plain(self)
        check_choice("optimizer", self.optimizer, get_args(OptimizerName))
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("param_rounding", self.param_rounding, ("stochastic", "nearest"))
        check_number("lr", self.lr)
        check_number("weight_decay", self.weight_decay)
        check_number("min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        check_number("wsd_decay_ratio", self.wsd_decay_ratio, 0.0, 1.0)
        if self.wsd_decay_ratio == 0:
            raise ValueError("wsd_decay_ratio=0 must be greater than 0")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int):
            raise TypeError(f"warmup_steps={self.warmup_steps!r} must be an int")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0")
        for name in ("no_decay", "keep_on_resume"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (tuple, list)):
                raise TypeError(f"{name}={value!r} must be a list of strings")
            # Frozen and of plain values: hashable, and a checkpoint that holds one loads with weights_only=True.
            object.__setattr__(self, name, tuple(value))
        for option in self.keep_on_resume:
            check_choice("keep_on_resume", option, tuple(_OPTIONS_OF_FIELDS))
        check_choice("convert_on_resume", self.convert_on_resume, (True, False))
        check_choice("release_gradients", self.release_gradients, (True, False))
        if self.release_gradients and self.optimizer not in _RELEASING:
            raise ValueError(
                f"release_gradients=True does not go with optimizer={self.optimizer!r}; accepted: "
                f"{', '.join(map(repr, _RELEASING))}"
            )
        if self.release_gradients and self.on_nonfinite == "skip":
            raise ValueError(
                "release_gradients=True does not go with on_nonfinite='skip': other parameters have been updated when "
                "the gradient of one is not finite; accepted: 'raise'"
            )
        if self.betas is not None:
            if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
                raise TypeError(f"betas={self.betas!r} must be a pair of numbers or None")
            object.__setattr__(self, "betas", tuple(self.betas))
        if self.state_precision is not None:
            object.__setattr__(self, "state_precision", str(StatePrecision.parse(self.state_precision)))
        # The optimizer knows its own options best: let it refuse them now rather than when training starts. The
        # parameter is on the meta device, so that it takes no memory, and large enough for any min_numel.
        self.build_optimizer([{"params": [nn.Parameter(torch.empty(1 << 16, 1 << 16, device="meta"))]}])

    def build_optimizer(self, params: Iterable[dict[str, Any]]) -> Optimizer:
        """Return the optimizer for these param groups, whose ``weight_decay`` is their own.

        Raises:
            ValueError: the optimizer does not accept an option.
            ModuleNotFoundError: the optimizer is in a package that is not installed.
        """
        betas = self.betas if self.betas is not None else _DEFAULT_BETAS[self.optimizer]
        groups = list(params)
        optimizer: Optimizer
        stochastic = self.optimizer != "muon-sign" if self.stochastic is None else self.stochastic
        if self.optimizer in ("stosign", "muon-sign"):
            kind = StoSignSGD if self.optimizer == "stosign" else MuonSign
            return kind(
                groups,
                lr=self.lr,
                betas=betas,
                weight_decay=self.weight_decay,
                stochastic=stochastic,
                seed=self.seed,
                state_precision=self.state_precision,
                param_rounding=self.param_rounding,
                on_nonfinite=self.on_nonfinite,
            )
        if self.optimizer == "signsgd":
            return SignSGD(
                groups,
                lr=self.lr,
                momentum=betas[0],
                weight_decay=self.weight_decay,
                state_precision=self.state_precision,
                param_rounding=self.param_rounding,
                on_nonfinite=self.on_nonfinite,
            )
        if self.optimizer == "alias":
            optimizer = ALIAS(
                groups,
                momentum=betas[0],
                beta2=betas[1],
                weight_decay=self.weight_decay,
                on_nonfinite=self.on_nonfinite,
            )
        elif self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=betas, weight_decay=self.weight_decay)
        elif self.optimizer == "lion":
            optimizer = _lion(groups, lr=self.lr, betas=betas, weight_decay=self.weight_decay)
        elif self.optimizer in ("sign-adamw", "sign-adamax"):
            base = torch.optim.AdamW if self.optimizer == "sign-adamw" else torch.optim.Adamax
            optimizer = SignConverted(
                groups,
                partial(base, betas=betas),
                lr=self.lr,
                weight_decay=self.weight_decay,
                stochastic=stochastic,
                seed=self.seed,
                on_nonfinite=self.on_nonfinite,
            )
        else:
            optimizer = _muon(groups, lr=self.lr, betas=betas, weight_decay=self.weight_decay)
        if self.state_precision is not None:
            emulate_state_precision(optimizer, self.state_precision)
        return optimizer

    def resumed(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, told by :func:`resume_with` how to take a checkpoint's state."""
        options = [option for field in self.keep_on_resume for option in _OPTIONS_OF_FIELDS[field]]
        resume_with(optimizer, [o for o in options if o in optimizer.defaults], convert=self.convert_on_resume)
        return optimizer


# LightningModule.save_hyperparameters() puts a config into checkpoints.
torch.serialization.add_safe_globals([StoSignConfig])


class StoSignMixin:
    """Gives a LightningModule ``configure_optimizers``: param groups, optimizer and schedule from one config.

    Set ``self.stosign`` to a :class:`StoSignConfig`; without it the defaults apply. Biases, norms and embeddings are
    not decayed by default, nor what the model itself exempts (timm's ``no_weight_decay()``, an attribute ``no_decay``
    of a parameter or module); override :meth:`decays` for another rule. Parameters that do not require a gradient are
    left out; a finetuning callback may add them later, in groups of its own, which are named and decayed by the same
    rule. The schedule runs by optimizer steps and ends with the training, whatever GradientAccumulationScheduler does.

    Example:
        >>> class Classifier(StoSignMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stosign = StoSignConfig(lr=1e-3, warmup_steps=100)
        ...         self.layer = nn.Linear(4, 2)
        >>> [sorted(group["param_names"]) for group in Classifier().param_groups()]
        [['layer.weight'], ['layer.bias']]
    """

    stosign: StoSignConfig = StoSignConfig()

    def decays(self, name: str, param: Tensor, module: nn.Module) -> bool:
        """Return whether weight decay applies to a parameter.

        Args:
            name: its full name.
            param: the parameter.
            module: the module that holds it; one of them, if it is shared.
        """
        words = name.rpartition(".")[2].split("_")
        kinds = {
            # Also in_proj_bias, bias_ih_l0 and the like.
            "bias": "bias" in words,
            # By name too, as models bring norms of their own: LlamaRMSNorm, te.RMSNorm; te's fused layer_norm_weight.
            "norm": isinstance(module, _NORMS) or type(module).__name__.endswith("Norm") or "norm" in words,
            "embedding": isinstance(module, _EMBEDDINGS),
        }
        if any(kinds[rule] if rule in kinds else fnmatchcase(name, rule) for rule in self.stosign.no_decay):
            return False
        return not _exempt_by_model(self._as_module(), name, param, module)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the param groups: at most one with and one without decay (and with Muon its matrices apart)."""
        return self._group_rule({"params": [p for p in self._as_module().parameters() if p.requires_grad]})

    def _group_rule(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Split a param group by decay and by Muon's matrices; its other options stay."""
        config, wanted = self.stosign, group["params"]
        wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
        wanted = [item[1] if isinstance(item, tuple) else item for item in wanted]
        # A shared parameter is decayed only if every module that holds it says so.
        decayed: dict[Tensor, bool] = {}
        is_embedding: dict[Tensor, bool] = {}
        names: dict[Tensor, str] = {}
        for prefix, owner in self._as_module().named_modules():
            for leaf, param in owner.named_parameters(prefix=prefix, recurse=False):
                names.setdefault(param, leaf)
                decayed[param] = decayed.get(param, True) and self.decays(leaf, param, owner)
                is_embedding[param] = is_embedding.get(param, False) or isinstance(owner, _EMBEDDINGS)
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        for number, param in enumerate(wanted):
            is_matrix = param.dim() == 2 and not is_embedding.get(param, False)
            use_muon = config.optimizer in ("muon", "muon-sign") and is_matrix
            decays = decayed.get(param, True)
            part = groups.setdefault(
                (use_muon, not decays),
                {
                    **{option: value for option, value in group.items() if option not in ("params", "param_names")},
                    "params": [],
                    "param_names": [],
                    "weight_decay": group.get("weight_decay", config.weight_decay) if decays else 0.0,
                },
            )
            if use_muon:
                part["use_muon"] = True
            part["params"].append(param)
            part["param_names"].append(names.get(param, f"params[{number}] of an added group"))
        return [groups[key] for key in sorted(groups)]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and, for a schedule that changes lr, its scheduler.

        Raises:
            ValueError: the schedule needs an end, but the trainer has none.
        """
        config = self.stosign
        module = self._as_module()
        optimizer = config.resumed(config.build_optimizer(self.param_groups()))
        follow_training(optimizer, module, self._group_rule)
        if config.release_gradients:
            assert isinstance(optimizer, LowPrecisionOptimizer)
            refuse_unless_releasable(module.trainer, module)
            # Callbacks change what a Trainer does, too.
            optimizer.register_step_pre_hook(lambda *_: refuse_unless_releasable(module.trainer, module))
            GradientRelease(optimizer)
        if config.schedule == "constant" and config.warmup_steps == 0:
            return {"optimizer": optimizer}
        warn_if_time_may_cut_it(config, module.trainer)
        scheduler = ScheduleToTheEnd(optimizer, config, module.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def _as_module(self) -> LightningModule:
        if not is_a(self, LightningModule):
            raise TypeError(
                f"{type(self).__name__} must be a LightningModule: class Model(StoSignMixin, LightningModule)"
            )
        return self


def _exempt_by_model(root: nn.Module, name: str, param: Tensor, owner: nn.Module) -> bool:
    """Return whether the model itself exempts a parameter from decay, as timm's models do."""
    if any(
        getattr(thing, mark, False) is True for thing in (param, owner) for mark in ("no_decay", "_no_weight_decay")
    ):
        return True
    module: Any = root
    parts = name.split(".")
    for depth, part in enumerate(parts):
        rest = ".".join(parts[depth:])
        if any(fnmatchcase(rest, pattern) for pattern in getattr(module, "no_weight_decay", tuple)()):
            return True
        if any(keyword in rest for keyword in getattr(module, "no_weight_decay_keywords", tuple)()):
            return True
        module = getattr(module, part, None)
    return False


def _lion(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    try:
        from pytorch_optimizer import Lion
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optimizer='lion' needs pytorch_optimizer: pip install 'lightning-stosign[optimizers]'"
        ) from error
    return Lion(groups, weight_decouple=True, **options)


def _muon(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer='muon' needs torch.optim.Muon (torch >= 2.9); this is torch {torch.__version__}")
    from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

    return MuonAdamW(groups, **options)
