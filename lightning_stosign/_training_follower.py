"""What an optimizer has to know of the training around it: layers that thaw, and windows of accumulated batches."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_stosign._lightning_names import is_a
from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.param_groups import GroupRule, add_by_rule
from lightning_stosign.optim.resuming import ADDITION
from lightning_stosign.schedule import batches_of_this_step
from lightning_stosign.strategies.sign_ddp import SignDDPStrategy


def follow_training(optimizer: Optimizer, module: LightningModule, rule: GroupRule) -> None:
    """Let an optimizer follow what finetuning callbacks and accumulation schedules do during training.

    * A group that is added is split by ``rule``. The groups that it becomes keep one learning rate, that of the last:
      a callback such as BackboneFinetuning goes on setting it in ``param_groups[-1]``.
    * Parameters that require a gradient only now are made known to DistributedDataParallel.
    * A resumed run unfreezes what the optimizer's state says was trained: Lightning's callbacks freeze it anew.
    * ALIAS is told how many batches each gradient is made of.

    Args:
        optimizer: the optimizer, with its first groups.
        module: whose parameters it trains.
        rule: the groups to take in place of one that is added.
    """
    trainer = module.trainer
    trained = {param for param in module.parameters() if param.requires_grad}

    def split(group: dict[str, Any]) -> list[dict[str, Any]]:
        groups = rule(group)
        number = 1 + max((old.get(ADDITION, 0) for old in optimizer.param_groups), default=0)
        _exchange_gradients(trainer, [p for part in groups for p in part["params"] if p not in trained])
        return [{**part, ADDITION: number} for part in groups]

    def before_step(_: Optimizer, args: Any, kwargs: Any) -> None:
        lrs: dict[int, Any] = {}
        for group in reversed(optimizer.param_groups):
            if ADDITION in group:
                group["lr"] = lrs.setdefault(group[ADDITION], group["lr"])
            if isinstance(optimizer, ALIAS) and module.automatic_optimization:
                group["accumulate_grad_batches"] = trainer.accumulate_grad_batches
                group["accumulated_batches"] = batches_of_this_step(trainer)

    def after_load(_: Optimizer) -> None:
        frozen = [
            param
            for group in optimizer.param_groups
            for param in group["params"]
            if not param.requires_grad and param not in trained
        ]
        _unfreeze(module, frozen)
        _exchange_gradients(trainer, frozen)

    add_by_rule(optimizer, split)
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_load_state_dict_post_hook(after_load)


def _unfreeze(module: torch.nn.Module, params: Sequence[Tensor]) -> None:
    wanted = set(params)
    for owner in module.modules():
        if any(param in wanted for param in owner.parameters(recurse=False)):
            if isinstance(owner, _BatchNorm):
                owner.track_running_stats = True  # as Lightning's callbacks do
            for param in owner.parameters(recurse=False):
                param.requires_grad_(param.requires_grad or param in wanted)


def _exchange_gradients(trainer: Trainer, params: Sequence[Tensor]) -> None:
    """Let DDP average the gradients of parameters that were frozen when it wrapped the model.

    Raises:
        RuntimeError: the strategy cannot.
    """
    strategy = trainer.strategy
    if not params or not is_a(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    if isinstance(strategy, SignDDPStrategy):
        if strategy.signs_of == "updates":  # which takes whatever has a gradient
            return
        raise RuntimeError(
            f"SignDDPStrategy(signs_of='gradients') does not exchange the gradients of {len(params)} parameters that "
            "were frozen when training started: the replicas would drift apart. Use signs_of='updates' or 'ddp', or "
            "start with all parameters trainable"
        )
    strategy.model = strategy.model.module
    strategy.configure_ddp()
