"""Which of the whole's values a process holds, against torch's own distribution of the values 0, 1, 2, ..."""

import types
from math import prod
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the "fake" backend

from lightning_stosign import StoSignSGD
from lightning_stosign.optim.kernels import dispatch, eager
from lightning_stosign.optim.numerics.noise import Stream, uniform_fraction, uniform_noise
from lightning_stosign.optim.sharding import local, local_grad, shard_of


@pytest.fixture(params=range(4))
def rank(request):
    """One process that believes to be one of four: nothing here communicates."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


SHAPES = [(8, 3), (5, 3), (2, 3), (7,), (0, 3), (3, 4, 5), (6, 1, 4)]


def spread(shape, mesh, placements):
    return distribute_tensor(torch.arange(prod(shape)).view(shape), mesh, placements, src_data_rank=None)


def assert_index_is_right(whole):
    values, shard = local(whole).flatten(), shard_of(whole)
    assert torch.equal(shard.index(0, values.numel()), values)
    middle = values.numel() // 2
    assert torch.equal(shard.index(middle, values.numel() - middle), values[middle:])
    assert shard.starts.numel() * shard.run == values.numel()
    return shard


@pytest.mark.parametrize("shape", SHAPES)
def test_index_of_a_shard_along_any_dimension(rank, shape):
    mesh = init_device_mesh("cpu", (4,))
    for placement in (Replicate(), *map(Split, range(len(shape)))):
        assert_index_is_right(spread(shape, mesh, [placement]))


@pytest.mark.parametrize("shape", SHAPES)
def test_index_of_a_shard_on_two_dimensional_meshes(rank, shape):
    mesh = init_device_mesh("cpu", (2, 2))
    for first in (Replicate(), *map(Split, range(len(shape)))):
        for second in (Replicate(), *map(Split, range(len(shape)))):
            assert_index_is_right(spread(shape, mesh, [first, second]))
    # Fully sharded after tensor parallelism on the same dimension, and what is not even a range of rows.
    assert_index_is_right(spread(shape, mesh, [_StridedShard(0, split_factor=2), Split(0)]))
    assert_index_is_right(spread(shape, mesh, [Split(0), _StridedShard(0, split_factor=2)]))


def test_rows_are_one_run_and_columns_one_run_a_row(rank):
    mesh = init_device_mesh("cpu", (4,))
    rows = assert_index_is_right(spread((8, 12), mesh, [Split(0)]))
    columns = assert_index_is_right(spread((8, 12), mesh, [Split(1)]))
    assert (rows.run, rows.starts.tolist()) == (24, [24 * rank])
    assert (columns.run, columns.starts.tolist()) == (3, [12 * i + 3 * rank for i in range(8)])


def test_wrapped_state_is_sharded_as_its_parameter(rank):
    param = spread((5, 3), init_device_mesh("cpu", (4,)), [Split(0)])
    state = torch.zeros_like(local(param), dtype=torch.float8_e4m3fn)
    wrapped = shard_of(param).wrap(state, param)
    assert isinstance(wrapped, DTensor) and wrapped.dtype == torch.float8_e4m3fn
    assert (wrapped.shape, wrapped.stride(), wrapped.placements) == (param.shape, param.stride(), param.placements)
    assert local(wrapped).data_ptr() == state.data_ptr()


def test_pending_sum_is_refused(rank):
    param = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (4,)), [Partial()])
    with pytest.raises(ValueError, match=r"a DTensor with placements \(Partial\(sum\),\); accepted: Shard and Replic"):
        shard_of(param)


def test_plain_tensor_is_no_shard():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    assert shard_of(param) is None and local(param) is param and local_grad(param) is param.grad


def test_gradients_are_checked_on_a_process_with_an_empty_shard(rank):
    mesh = init_device_mesh("cpu", (4,))
    params = [torch.nn.Parameter(spread((rows, 3), mesh, [Split(0)]).float()) for rows in (2, 8)]
    for param in params:
        param.grad = torch.ones_like(param)
    local(params[1].grad)[0, 0] = torch.inf
    jobs = StoSignSGD(params)._jobs([(i, param, options()) for i, param in enumerate(params)])
    batches = dispatch.choose(jobs)
    dispatch.look(batches)
    assert dispatch.nonfinite_on_device(jobs, batches).tolist() == [0, 1]
    assert dispatch.nonfinite_on_host(jobs, batches) == [False, True]


def options():
    return StoSignSGD([torch.ones(1, requires_grad=True)]).param_groups[0]


@pytest.mark.parametrize("starts", [[2**32 - 700], [2**32 - 1000, 7, 2**34 - 1]])
def test_a_part_across_the_key_s_boundary_draws_the_noise_of_its_elements(starts):
    run = 2000 // len(starts)
    shard = types.SimpleNamespace(starts=torch.tensor(starts), run=run)
    param = torch.nn.Parameter(torch.zeros(run * len(starts)))
    param.grad = torch.zeros_like(param)
    with patch("lightning_stosign.optim.kernels.job.shard_of", return_value=shard):
        (job,) = StoSignSGD([param], seed=5, param_rounding="nearest")._jobs([(0, param, {**options(), "seed": 5})])
    for stream, uniform in ((Stream.UPDATE, uniform_noise), (Stream.ROUND_STATE, uniform_fraction)):
        job.keys = {stream: 3}
        drawn = eager.draw_noise(job, 0, param, stream)
        assert torch.equal(drawn, torch.cat([uniform(3, run, start=start) for start in starts]))
