"""Muon for the matrices and AdamW for the rest, as one optimizer."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_stosign._plain import make_plain
from lightning_stosign.optim.base import check_beta, check_choice, check_lr, check_number, check_pair, loss_of
from lightning_stosign.optim.param_groups import FollowingOptimizer
from lightning_stosign.optim.rehearsal import is_rehearsal, rehearse


class MuonAdamW(FollowingOptimizer):
    """torch's Muon and torch's AdamW behind one optimizer, as Lightning's automatic optimization wants.

    Muon orthogonalises the update of a matrix and takes nothing else; embeddings, norms and biases go to AdamW. Both
    share this optimizer's param groups and states. Muon's learning rate is adjusted to AdamW's update RMS, so that one
    ``lr`` serves both.

    Args:
        params: param groups. Groups with ``use_muon=True`` hold matrices (2-D) and go to Muon.
        lr: learning rate, >= 0.
        betas: AdamW's, and ``betas[0]`` is Muon's momentum; both in [0, 1).
        weight_decay: decoupled weight decay, >= 0.

    Raises:
        ValueError: an option is out of range; a parameter of a ``use_muon`` group is not 2-D.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MuonAdamW([{"params": [model.weight], "use_muon": True}, {"params": [model.bias]}])
        >>> [type(part).__name__ for part in optimizer.parts]
        ['Muon', 'AdamW']

    Source:
        K. Jordan et al., "Muon", 2024; learning-rate adjustment of J. Liu et al., arXiv 2502.16982.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "use_muon": False})

    def _groups_changed(self, changed: list[dict[str, Any]]) -> None:
        for group in changed:
            make_plain(group)
            _check_group(group)
            if group["use_muon"]:
                group.setdefault("momentum", group["betas"][0])
        self._build_parts()

    def _build_parts(self) -> None:
        """Let torch's two optimizers work on this one's param groups and states."""
        parts: list[Optimizer] = []
        for use_muon in (True, False):
            groups = [group for group in self.param_groups if group["use_muon"] is use_muon]
            if not groups:
                continue
            # torch fills its own defaults into the very group dictionaries, so schedulers and state_dict see them all.
            part: Optimizer = Muon(groups, adjust_lr_fn="match_rms_adamw") if use_muon else AdamW(groups)
            part.param_groups = groups
            part.state = self.state
            parts.append(part)
        self.parts = parts

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = defaultdict(dict, self.state)
        self._build_parts()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step of both optimizers; returns the closure's loss."""
        self._follow_groups()
        if is_rehearsal(self, closure):
            return rehearse(self, self._step_parts, "step")
        loss = loss_of(closure)
        self._step_parts()
        return loss

    def _step_parts(self) -> None:
        for part in self.parts:
            part.step()


def _check_group(group: dict[str, Any]) -> None:
    """Raise unless a group's options are in range: torch's optimizers check only the defaults they are given."""
    check_lr(group["lr"])
    check_number("weight_decay", group["weight_decay"])
    check_pair("betas", group["betas"])
    for i, beta in enumerate(group["betas"]):
        check_beta(f"betas[{i}]", beta)
    check_choice("use_muon", group["use_muon"], (True, False))
