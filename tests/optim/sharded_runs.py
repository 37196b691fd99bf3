"""Runs of the optimizers on sharded parameters, each beside the unsharded run that it must equal bit for bit.

Four processes go through SCENARIOS together, in meshes of one, two or four of them; what a scenario raises in any of
them is its result.
"""

import json
import traceback
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_stosign.optim import MuonSign, SignSGD, StoSignSGD

WORLD = 4

# Uneven over 2 and 4, with an empty shard (5 rows over 4) or three (1 row), rows of a kernel's 256 values and not.
SHAPES = [(5, 512), (1, 3), (7,), (8, 96), (6, 4, 10)]


def muon_sign(params, **options):
    return MuonSign([{"params": [param], "use_muon": param.dim() == 2} for param in params], **options)


OPTIMIZERS = {
    "float32": partial(StoSignSGD, weight_decay=0.1),
    "in expectation, damped": partial(StoSignSGD, betas=(0.9, 0.9), stochastic=False),
    "bfloat16 states": partial(StoSignSGD, state_precision="bfloat16:min_numel=0"),
    "fp8": partial(StoSignSGD, state_precision="fp8:min_numel=0", weight_decay=0.1),
    "fp8 for large parameters": partial(StoSignSGD, state_precision="fp8:min_numel=2000"),  # of the whole, not a shard
    "fp8, stochastic": partial(StoSignSGD, state_precision="fp8:stochastic_rounding=true,min_numel=0"),
    "SignSGD": partial(SignSGD, weight_decay=0.1),
    "MuonSign, fp8": partial(muon_sign, state_precision="fp8:stochastic_rounding=true,min_numel=0", weight_decay=0.1),
    "SignSGD, fp8": partial(SignSGD, state_precision="fp8:min_numel=0"),
}

FUSED = {
    "fused": partial(StoSignSGD, fused=True, weight_decay=0.1),
    "fused, fp8": partial(StoSignSGD, fused=True, state_precision="fp8:min_numel=0"),
}


def values(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sharded_params(mesh, placements, dtype=torch.float32):
    """The parameters as DTensors; placements along a dimension that a parameter lacks fall back to the first."""
    params = []
    for seed, shape in enumerate(SHAPES):
        fitting = [Shard(0) if isinstance(p, Shard) and p.dim >= len(shape) else p for p in placements]
        params.append(nn.Parameter(distribute_tensor(values(shape, seed, dtype), mesh, fitting, src_data_rank=None)))
    return params


def unsharded_params(dtype=torch.float32):
    return [nn.Parameter(values(shape, seed, dtype)) for seed, shape in enumerate(SHAPES)]


def step(optimizer, params, number):
    """One step on gradients that depend on its number alone, much larger on the first rows than on the others."""
    for seed, param in enumerate(params):
        grad = values(param.shape, 100 * number + seed, param.dtype)
        grad[0] *= 1000 / number
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad
    optimizer.step()


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_equal_to_unsharded(params, optimizer, plain_params, plain):
    for param, expected in zip(params, plain_params, strict=True):
        assert torch.equal(whole(param.detach()), expected.detach()), f"parameter {list(param.shape)}"
        assert optimizer.state[param].keys() == plain.state[expected].keys()
        for name, value in plain.state[expected].items():
            found = optimizer.state[param][name]
            assert found.dtype == value.dtype
            if isinstance(found, DTensor):
                assert found.placements == param.placements
                # float8 tensors cannot be gathered everywhere: as float32, exactly
                found = DTensor.from_local(
                    found.to_local().float(),
                    found.device_mesh,
                    found.placements,
                    run_check=False,
                    shape=found.shape,
                    stride=found.stride(),
                )
            assert torch.equal(whole(found).double(), value.double()), f"{name} of {list(param.shape)}"


def equals_unsharded(build, placements, mesh, dtype=torch.float32):
    params, plain_params = sharded_params(mesh, placements, dtype), unsharded_params(dtype)
    optimizer, plain = build(params, lr=0.01), build(plain_params, lr=0.01, fused=False)
    for number in range(1, 4):
        step(optimizer, params, number)
        step(plain, plain_params, number)
    assert_equal_to_unsharded(params, optimizer, plain_params, plain)


class Model(nn.Module):
    """Weights of 5, 3 and 1 rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        return self.layers(x)


def train(model, optimizer, numbers):
    for number in numbers:
        optimizer.zero_grad()
        x = values((8, 6), number).to(next(model.parameters()).dtype)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def fsdp2_equals_unsharded(build, mesh, dtype=torch.float32):
    """All processes see the same data, so that the mean of their gradients is the unsharded gradient exactly."""
    model, plain = fully_shard(Model().to(dtype), mesh=mesh), Model().to(dtype)
    optimizer, unsharded = build(model.parameters(), lr=0.01), build(plain.parameters(), lr=0.01)
    train(model, optimizer, range(4))
    train(plain, unsharded, range(4))
    assert_equal_to_unsharded([*model.parameters()], optimizer, [*plain.parameters()], unsharded)


def checkpoint_moves_between_worlds(build, folder, meshes, source, target):
    """Saved by some processes, loaded by others, trained on: the unsharded run."""
    plain = Model()
    unsharded = build(plain.parameters(), lr=0.01)
    train(plain, unsharded, range(3))
    saving, loading = meshes[source], meshes[target]
    if saving.get_coordinate() is not None:
        model = fully_shard(Model(), mesh=saving)
        optimizer = build(model.parameters(), lr=0.01)
        train(model, optimizer, range(3))
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder, process_group=saving.get_group())
    dist.barrier()
    if loading.get_coordinate() is not None:
        model = fully_shard(Model(), mesh=loading)
        optimizer = build(model.parameters(), lr=0.5)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder, process_group=loading.get_group())
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert_equal_to_unsharded([*model.parameters()], optimizer, [*plain.parameters()], unsharded)
        train(model, optimizer, range(3, 6))
        train(plain, unsharded, range(3, 6))
        assert_equal_to_unsharded([*model.parameters()], optimizer, [*plain.parameters()], unsharded)


def nonfinite_value_on_one_process_stops_all(mesh):
    params = sharded_params(mesh, [Shard(0)])
    optimizer = StoSignSGD(params, lr=0.01, state_precision="fp8:min_numel=0")
    step(optimizer, params, 1)
    before = [param.detach().to_local().clone() for param in params]
    for bad in (torch.nan, torch.inf):
        local = params[3].grad.to_local()
        if mesh.get_local_rank() == mesh.size() - 1:
            local[0, 0] = bad
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "the gradient of params[3] of group 0 [8, 96] is not finite" in str(error), str(error)
        else:
            raise AssertionError("no error")
    for param, values_before in zip(params, before, strict=True):
        assert torch.equal(param.detach().to_local(), values_before)
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


def gradient_spread_otherwise_is_brought_to_its_parameter(mesh):
    params, plain_params = sharded_params(mesh, [Shard(0)]), unsharded_params()
    optimizer, plain = StoSignSGD(params, lr=0.01), StoSignSGD(plain_params, lr=0.01)
    for param, expected in zip(params, plain_params, strict=True):
        expected.grad = torch.ones_like(expected)
        param.grad = distribute_tensor(torch.ones(param.shape), mesh, [Replicate()], src_data_rank=None)
    optimizer.step()
    plain.step()
    assert_equal_to_unsharded(params, optimizer, plain_params, plain)


def blocks_are_refused(mesh):
    for spec in ("fp8-block:min_numel=0", "fp4-block:min_numel=0"):
        try:
            StoSignSGD(sharded_params(mesh, [Shard(0)]), state_precision=spec)
        except ValueError as error:
            assert f"state_precision='{spec}': the blocks of a sharded parameter" in str(error), str(error)
        else:
            raise AssertionError("no error")


def scenarios(meshes, folder):
    """Name -> (the mesh whose processes take part, or None for all, and what they do)."""
    found = {}
    for world in (1, 2, 4):
        mesh = meshes[world]
        for name, build in OPTIMIZERS.items():
            found[f"rows over {world}, {name}"] = mesh, partial(equals_unsharded, build, [Shard(0)], mesh)
        found[f"bfloat16 rows over {world}"] = (
            mesh,
            partial(equals_unsharded, OPTIMIZERS["fp8, stochastic"], [Shard(0)], mesh, torch.bfloat16),
        )
        for name in ("float32", "fp8"):
            found[f"FSDP2 over {world}, {name}"] = mesh, partial(fsdp2_equals_unsharded, OPTIMIZERS[name], mesh)
    for name in ("fp8", "fp8, stochastic", "float32"):
        build = OPTIMIZERS[name]
        for title, placements in {
            "columns": [Shard(1)],
            "last dimension": [Shard(2)],
            "replicas": [Replicate()],
        }.items():
            found[f"{title} over 2, {name}"] = meshes[2], partial(equals_unsharded, build, placements, meshes[2])
        for title, placements in {
            "replicated rows": [Replicate(), Shard(0)],
            "rows and columns": [Shard(0), Shard(1)],
        }.items():
            found[f"{title} over 2 x 2, {name}"] = (
                meshes["2x2"],
                partial(equals_unsharded, build, placements, meshes["2x2"]),
            )
    found["bfloat16 FSDP2 over 4"] = (
        meshes[4],
        partial(fsdp2_equals_unsharded, OPTIMIZERS["fp8"], meshes[4], torch.bfloat16),
    )
    for source, target in ((2, 1), (2, 4), (1, 2)):
        for name in ("fp8, stochastic", "SignSGD"):
            found[f"checkpoint from {source} to {target}, {name}"] = (
                None,
                partial(
                    checkpoint_moves_between_worlds,
                    OPTIMIZERS[name],
                    f"{folder}/{source}-{target}-{name}",
                    meshes,
                    source,
                    target,
                ),
            )
    found["non-finite"] = meshes[4], partial(nonfinite_value_on_one_process_stops_all, meshes[4])
    found["gradient spread otherwise"] = (
        meshes[2],
        partial(gradient_spread_otherwise_is_brought_to_its_parameter, meshes[2]),
    )
    found["blocks"] = meshes[2], partial(blocks_are_refused, meshes[2])
    return found


def compiled_scenarios(meshes, folder):
    """As :func:`scenarios`, but slow."""
    return {
        f"{title} over {mesh.size()}, {name}": (mesh, partial(equals_unsharded, build, placements, mesh))
        for name, build in FUSED.items()
        for title, placements, mesh in (("rows", [Shard(0)], meshes[2]), ("columns", [Shard(1)], meshes[2]))
    }


def main(rank, folder, which):
    """Go through the scenarios as one of the four processes; the first writes each one's error, or "", to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),  # processes that no longer agree wait for each other
    )
    meshes = {world: DeviceMesh("cpu", torch.arange(world)) for world in (1, 2, 4)}
    meshes["2x2"] = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    results = {}
    for name, (mesh, run) in which(meshes, folder).items():
        error = ""
        if mesh is None or mesh.get_coordinate() is not None:
            try:
                run()
            except Exception:
                error = traceback.format_exc()
        errors = [None] * WORLD
        dist.all_gather_object(errors, error)
        results[name] = "\n".join(filter(None, errors))
    if rank == 0:
        with open(f"{folder}/results.json", "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()
