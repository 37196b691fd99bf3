"""promote_state: one parameter's states move to wider storage, and nothing else changes."""

import copy
import io
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the "fake" backend

from lightning_stosign import SignSGD, StatePrecision, StoSignSGD, emulate_state_precision, promote_state
from lightning_stosign.health import read_moments
from lightning_stosign.optim.emulation import as_stored
from lightning_stosign.optim.promotion import next_wider, state_precision_of

SHAPES = [(3, 70), (130,), ()]


def plain_adamw(params, lr, state_precision):
    return torch.optim.AdamW(params, lr)


def emulated_adamw(params, lr, state_precision):
    optimizer = torch.optim.AdamW(params, lr)
    emulate_state_precision(optimizer, state_precision)
    return optimizer


OPTIMIZERS = {"stosign": StoSignSGD, "signsgd": SignSGD, "adamw": emulated_adamw}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def exactly(name):
    """The precision with this name, for parameters however small."""
    return replace(StatePrecision.parse(name), min_numel=0)


def build(make, precision, dtype=torch.float32):
    if isinstance(precision, str):
        precision = exactly(precision)
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in SHAPES]
    return params, make(params, lr=0.01, state_precision=precision)


def step(params, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for x in params:
            noise = torch.randn(x.shape, generator=generator)
            x.grad = (noise * torch.randn(x.shape, generator=generator).mul(6).exp2() * 1e-3).to(x.dtype)
        optimizer.step()


def values(optimizer, param):
    """The values of a parameter's states in float32, copied."""
    moments = read_moments(optimizer, param, optimizer.param_groups[0])
    return {name: value.clone() for name, value in moments.states.items()}


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the ladder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ladder",
    [
        ["fp8-raw", "fp8", "fp8-block", "bfloat16", "float32"],
        ["fp8-raw:static_scale=1024.0", "fp8"],
        ["fp8-raw:dtype=float8_e5m2", "fp8:dtype=float8_e5m2", "fp8-block:dtype=float8_e5m2", "bfloat16"],
        ["fp8:block_size=32", "fp8-block:block_size=32", "bfloat16", "float32"],
        ["fp8-block:stochastic_rounding=True", "bfloat16:stochastic_rounding=True", "float32"],
        ["fp4-block", "fp8-block"],
        ["fp4-block:stochastic_rounding=True,min_numel=7", "fp8-block:stochastic_rounding=True,min_numel=7"],
        ["fp8-block:min_numel=7", "bfloat16:min_numel=7", "float32:min_numel=7"],
        ["float16", "float32"],
        ["float16:scaling=block", "float32"],
    ],
    ids=lambda ladder: ladder[0],
)
def test_each_storage_has_its_next_wider_one(ladder):
    for narrow, wide in pairwise(ladder):
        assert next_wider(StatePrecision.parse(narrow)) == StatePrecision.parse(wide)


def test_nothing_is_wider_than_float32():
    assert next_wider(StatePrecision.parse("float32")) is None


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(
        ["fp8-raw", "fp8-raw:static_scale=1024", "fp8:dtype=float8_e5m2", "fp8:block_size=8", "float16"]
    ),
    seed=st.integers(0, 2**31),
    spread=st.integers(0, 30),
)
def test_what_a_format_holds_all_wider_ones_hold_too(name, seed, spread):
    precision = StatePrecision.parse(name)
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread + 1, (100,), generator=generator)
    held = as_stored(torch.randn(100, generator=generator) * torch.exp2(exponents), precision)
    while precision is not None:
        assert torch.equal(as_stored(held, precision), held), precision
        precision = next_wider(precision)


# ---- one promotion ---------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_changes_up_the_whole_ladder(make, dtype):
    params, optimizer = build(make, "fp8-raw:static_scale=256", dtype)
    step(params, optimizer, range(5))
    for x in params:
        before = values(optimizer, x)
        assert any(value.count_nonzero() for value in before.values())
        for expected in map(exactly, ("fp8", "fp8-block", "bfloat16", "float32")):
            assert promote_state(optimizer, x) == expected
            assert state_precision_of(optimizer, x) == expected
            after = values(optimizer, x)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], value) for name, value in before.items()), expected


@pytest.mark.parametrize("cls", [StoSignSGD, SignSGD])
@pytest.mark.parametrize("precision", ["fp8-raw", "fp8", "fp8-block", "bfloat16", "fp4-block"])
def test_storage_is_that_of_an_optimizer_made_with_the_wider_precision(cls, precision):
    params, optimizer = build(cls, precision)
    step(params, optimizer, range(2))
    wider = next_wider(exactly(precision))
    others, made = build(cls, wider)
    step(others, made, range(2))
    for x, y in zip(params, others, strict=True):
        promote_state(optimizer, x)
        layout = {name: (v.dtype, v.shape) for name, v in optimizer.state[x].items() if torch.is_tensor(v)}
        assert layout == {name: (v.dtype, v.shape) for name, v in made.state[y].items()}


@pytest.mark.parametrize("cls", [StoSignSGD, SignSGD])
@pytest.mark.parametrize("precision", ["fp8-raw:static_scale=64", "fp8:stochastic_rounding=true", "fp8-block"])
def test_training_goes_on_as_with_the_wider_precision_from_there(cls, precision):
    params, optimizer = build(cls, precision)
    step(params, optimizer, range(3))
    others, other = build(cls, next_wider(exactly(precision)))
    for x in params:
        promote_state(optimizer, x)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        del state["state_precision"]
    state_dict["param_groups"][0]["state_precision"] = other.param_groups[0]["state_precision"]
    other.load_state_dict(state_dict)
    for x, y in zip(params, others, strict=True):
        y.data.copy_(x)
    for pair in ((params, optimizer), (others, other)):
        step(*pair, range(3, 8))
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))


def test_the_envelope_covers_before_and_after():
    params, optimizer = build(StoSignSGD, "fp8-raw")
    for rung in range(5):
        step(params, optimizer, range(3 * rung, 3 * rung + 3))
        for x in params:
            if rung:
                promote_state(optimizer, x)
            held = values(optimizer, x)
            assert bool((held["exp_avg"].abs() <= held["exp_inf"]).all())


@pytest.mark.parametrize("block", [0, 1])
def test_beyond_bfloat16_s_range_the_envelope_still_covers(block):
    params, optimizer = build(StoSignSGD, "fp8-block:block_size=64")
    (x, *_) = params
    step(params, optimizer, [0])
    state = optimizer.state[x]
    for name in ("exp_avg", "exp_inf"):  # 2**-135, which bfloat16 does not hold
        state[name].fill_(2.0**-9)
        state[name + "_scale"][block] = 2.0**-126
    promote_state(optimizer, x)
    held = values(optimizer, x)
    assert bool((held["exp_avg"].abs() <= held["exp_inf"]).all())
    assert bool((held["exp_inf"] > 0).all())


def test_other_parameters_keep_their_precision():
    params, optimizer = build(StoSignSGD, "fp8")
    step(params, optimizer, range(2))
    before = {name: value.clone() for name, value in optimizer.state[params[1]].items()}
    promote_state(optimizer, params[0])
    assert state_precision_of(optimizer, params[1]) == exactly("fp8")
    for name, value in optimizer.state[params[1]].items():
        assert value.dtype == before[name].dtype and torch.equal(value.double(), before[name].double())


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("cls", [StoSignSGD, SignSGD])
def test_sharded_states_climb_without_blocks(mesh, cls):
    param = torch.nn.Parameter(distribute_tensor(torch.full((3, 70), 0.5), mesh, [Shard(0)]))
    optimizer = cls([param], lr=0.01, state_precision="fp8-raw:min_numel=0")
    param.grad = distribute_tensor(torch.randn(3, 70, generator=torch.Generator().manual_seed(0)), mesh, [Shard(0)])
    optimizer.step()
    before = values(optimizer, param)
    for expected in map(exactly, ("fp8", "bfloat16", "float32")):
        assert promote_state(optimizer, param) == expected
        after = values(optimizer, param)
        assert all(torch.equal(after[name], value) for name, value in before.items()), expected
        assert all(isinstance(optimizer.state[param][name], DTensor) for name in before)


def test_an_emulated_parameter_is_rounded_to_its_own_precision_from_then_on():
    params, optimizer = build(emulated_adamw, "fp8-raw")
    others, plain = build(plain_adamw, None)
    step(params, optimizer, [0])
    promote_state(optimizer, params[0])
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(params, optimizer, [1])
    step(others, plain, [1])
    for x, y, name in zip(params, others, ("fp8", "fp8-raw", "fp8-raw"), strict=True):
        for state, degree in (("exp_avg", 1), ("exp_avg_sq", 2)):
            expected = as_stored(plain.state[y][state], StatePrecision.parse(name), degree)
            assert torch.equal(optimizer.state[x][state], expected), (name, state)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("precision", ["fp8-raw:static_scale=64", "fp8", "fp8-block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_the_promotion_and_training_continues_bit_for_bit(make, precision, dtype):
    params, optimizer = build(make, precision, dtype)
    step(params, optimizer, range(3))
    promote_state(optimizer, params[0])
    promote_state(optimizer, params[1])
    promote_state(optimizer, params[1])
    step(params, optimizer, range(3, 5))
    saved = through_a_file(optimizer.state_dict())

    others, loaded = build(make, precision, dtype)
    for x, y in zip(params, others, strict=True):
        y.data.copy_(x)
    loaded.load_state_dict(saved)
    for x, y in zip(params, others, strict=True):
        assert state_precision_of(loaded, y) == state_precision_of(optimizer, x)
    for pair in ((params, optimizer), (others, loaded)):
        step(*pair, range(5, 9))
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))


@each_optimizer
def test_param_groups_do_not_change(make):
    params, optimizer = build(make, "fp8")
    step(params, optimizer, [0])
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    promote_state(optimizer, params[0])
    assert optimizer.state_dict()["param_groups"] == before


def test_a_copy_keeps_the_promotion():
    params, optimizer = build(StoSignSGD, "fp8")
    step(params, optimizer, [0])
    promote_state(optimizer, params[0])
    others, copied = copy.deepcopy((params, optimizer))
    for pair in ((params, optimizer), (others, copied)):
        step(*pair, [1, 2])
    assert state_precision_of(copied, others[0]) == exactly("fp8-block")
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "precision", "steps", "message"),
    [
        (plain_adamw, None, 1, "optimizer: AdamW has no state_precision to promote; accepted:"),
        (StoSignSGD, None, 1, "optimizer: StoSignSGD has no state_precision to promote"),
        (StoSignSGD, "float32", 1, r"of shape \[3, 70\] has its states in float32"),
        (emulated_adamw, "float32", 1, r"of shape \[3, 70\] has its states in float32"),
        (
            StoSignSGD,
            StatePrecision.parse("fp8"),
            1,
            r"of shape \[3, 70\] has its states in float32",
        ),
        (emulated_adamw, StatePrecision.parse("fp8"), 1, r"of shape \[3, 70\] has its states in float32"),
        (StoSignSGD, "fp8", 0, r"of shape \[3, 70\] has no state yet"),
        (emulated_adamw, "fp8", 0, r"of shape \[3, 70\] has no state yet"),
    ],
)
def test_what_cannot_be_promoted_is_refused_in_the_user_s_words(make, precision, steps, message):
    params, optimizer = build(make, precision)
    step(params, optimizer, range(steps))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        promote_state(optimizer, params[0])
    assert optimizer.state_dict()["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        assert optimizer.state_dict()["state"][index].keys() == state.keys()


def test_a_foreign_parameter_is_refused():
    _, optimizer = build(StoSignSGD, "fp8")
    with pytest.raises(ValueError, match=r"param: a parameter of shape \[4\] is none of this StoSignSGD's"):
        promote_state(optimizer, torch.nn.Parameter(torch.zeros(4)))
