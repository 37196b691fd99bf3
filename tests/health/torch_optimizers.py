"""Every optimizer of torch.optim, and this package's, after some steps."""

import torch
from torch import nn

from lightning_stosign import MuonSign, SignSGD, StoSignSGD
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

FACTORIES = {
    "ASGD": lambda params: torch.optim.ASGD(params),
    "Adadelta": lambda params: torch.optim.Adadelta(params),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "Adagrad": lambda params: torch.optim.Adagrad(params),
    "Adam": lambda params: torch.optim.Adam(params),
    "AdamW": lambda params: torch.optim.AdamW(params),
    "Adamax": lambda params: torch.optim.Adamax(params),
    "LBFGS": lambda params: torch.optim.LBFGS(params, max_iter=3),
    "Muon": lambda params: torch.optim.Muon(params),
    "NAdam": lambda params: torch.optim.NAdam(params),
    "RAdam": lambda params: torch.optim.RAdam(params),
    "RMSprop": lambda params: torch.optim.RMSprop(params),
    "Rprop": lambda params: torch.optim.Rprop(params),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "SparseAdam": lambda params: torch.optim.SparseAdam(params),
}
OURS = {
    "StoSignSGD": lambda params: StoSignSGD(params),
    "SignSGD": lambda params: SignSGD(params),
    "MuonSign": lambda params: MuonSign([{"params": params, "use_muon": True}]),
    "MuonAdamW": lambda params: MuonAdamW([{"params": params, "use_muon": True}]),
}


def stepped(factory, sparse=False, steps=2):
    """Return (optimizer, its only parameter, a matrix), after some steps."""
    torch.manual_seed(0)
    layer = nn.Embedding(5, 4, sparse=sparse)
    optimizer = factory([layer.weight])

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.tensor([0, 1, 3])).sin().square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, layer.weight
