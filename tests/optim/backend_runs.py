"""Short runs over many kinds of parameters, to compare backends, and whether they agree bit for bit."""

import os
from typing import Any

import torch
from torch import nn

from lightning_stosign import SignSGD, StoSignSGD

KINDS: dict[str, dict[str, Any]] = {
    "Algorithm 3": {},
    "Algorithm 10": {"stochastic": False, "weight_decay": 0.1},
    "Algorithm 11": {"betas": (0.5, 0.9), "maximize": True},
    "Algorithm 11 in expectation": {"betas": (0.9, 0.99), "stochastic": False},
    "SignSGD": {"cls": SignSGD, "weight_decay": 0.1},
    "SignSGD without momentum": {"cls": SignSGD, "momentum": 0.0, "maximize": True},
}
# None and one value, odd, a whole number of blocks and more or less, and more than a thread's or a program's share.
SHAPES = [(0, 3), (1,), (), (7,), (64, 64), (129, 130), (4097,), (300, 7), (20_480,)]
if os.environ.get("TRITON_INTERPRET") == "1":  # whose cost is per program
    SHAPES = [(0, 3), (1,), (), (7, 300), (4097,)]
LAYOUTS = {
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
}


def train(shapes=SHAPES, layout=None, *, cls=StoSignSGD, dtype=torch.float32, steps=4, bad=1, **options):
    """Return parameters and optimizer after some steps with ever smaller lr and gradients, one of them not finite."""
    generator = torch.Generator().manual_seed(0)
    arrange = LAYOUTS[layout] if layout is not None else lambda t: t
    params = [nn.Parameter(arrange(torch.randn(shape, generator=generator).to(dtype))) for shape in shapes]
    if cls is StoSignSGD:
        options["seed"] = 3
    optimizer = cls(params, lr=1e-2, on_nonfinite="skip", **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for param in params:
            grad = (torch.randn(param.shape, generator=generator) * 10 ** (-step / 2)).to(dtype)
            if grad.numel() > 4000:
                grad.view(-1)[1000:2500] = 0  # coordinates that stay dead, and blocks of them
                grad.view(-1)[2500:4000] *= 1e-40
            param.grad = arrange(grad)
        if step == bad:
            params[-1].grad[-1] = torch.inf
        optimizer.step()
    return params, optimizer


def assert_equal(a, b, what=""):
    assert a.dtype == b.dtype, what
    a, b = a.detach().double(), b.detach().double()
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)), what


def assert_same_runs(run, other):
    for p, q in zip(run[0], other[0], strict=True):
        assert_equal(p, q, p.shape)
        assert run[1].state[p].keys() == other[1].state[q].keys()
        for name, value in run[1].state[p].items():
            assert_equal(value, other[1].state[q][name], (name, p.shape))
