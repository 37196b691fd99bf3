"""Short runs of many kinds of parameters, to compare the paths of a step."""

import torch
from torch import nn

from lightning_stosign import StoSignSGD


def train(shapes, cls=StoSignSGD, steps=12, dtype=torch.float32, **options):
    """Return parameters of these shapes and their optimizer after some steps, each with a smaller lr and gradient."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    if cls is StoSignSGD:
        options["seed"] = 3
    optimizer = cls(params, lr=1e-2, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype) * 10 ** (-step / 2)
            param.grad.view(-1)[1000:4000] = 0  # coordinates that stay dead, and blocks of them
            param.grad.view(-1)[4000:8000] *= 1e-40
        optimizer.step()
    return params, optimizer
