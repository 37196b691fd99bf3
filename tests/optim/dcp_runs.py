"""A promoted optimizer goes through torch.distributed.checkpoint, in one process or several, and trains on."""

import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_stosign import MuonSign, SignSGD, StoSignSGD, emulate_state_precision, promote_state
from lightning_stosign.optim.promotion import state_precision_of

PROMOTIONS = (1, 0, 2, 1)  # of each parameter


def emulated_adamw(params):
    optimizer = torch.optim.AdamW(params, 0.01)
    emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
    return optimizer


def muon_sign(params):
    groups = [{"params": [param], "use_muon": param.dim() == 2} for param in params]
    return MuonSign(groups, 0.01, state_precision="fp8-raw:static_scale=64,min_numel=0")


MAKES = {
    "MuonSign": muon_sign,
    "StoSignSGD": partial(StoSignSGD, lr=0.01, state_precision="fp8-raw:static_scale=64,min_numel=0"),
    "SignSGD": partial(SignSGD, lr=0.01, state_precision="fp8:stochastic_rounding=true,min_numel=0"),
    "emulated AdamW": emulated_adamw,
}


def net(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4))
    return model if mesh is None else fully_shard(model, mesh=mesh)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()


def promote(model, optimizer):
    for param, times in zip(model.parameters(), PROMOTIONS, strict=True):
        for _ in range(times):
            promote_state(optimizer, param)


def through_dcp(make, mesh, folder, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = net(mesh)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    promote(model, optimizer)
    train(model, optimizer, range(3, 5))
    model_state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder)

    other = net(mesh)
    loaded = make(other.parameters())
    other.load_state_dict(model_state)
    get_optimizer_state_dict(other, loaded, options=options)  # creates the states
    promote(other, loaded)
    state = {"optimizer": get_optimizer_state_dict(other, loaded, options=options)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, loaded, state["optimizer"], options=options)
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert state_precision_of(loaded, y) == state_precision_of(optimizer, x)
        assert optimizer.state[x].keys() == loaded.state[y].keys()
    for pair in ((model, optimizer), (other, loaded)):
        train(*pair, range(5, 9))
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        one, two = (p if mesh is None else p.to_local() for p in (x, y))
        assert torch.equal(one, two)


def main(rank, folder, world):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (world,))
    for name, make in MAKES.items():
        through_dcp(make, mesh, Path(folder, name), flatten=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    os._exit(0)  # now and then gloo's threads abort the interpreter's own end
