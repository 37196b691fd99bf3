"""Optimizers of other packages: the real ones where they are installed, and stand-ins that store as they do."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_stosign.health import read_moments

EXACT = {"rtol": 1e-6, "atol": 0.0}


def planted(shape, seed, positive=False):
    """float32 values over ten decades with zeros, subnormal numbers and outliers."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 0, shape)
    flat = values.reshape(-1)
    flat[::13], flat[3::97], flat[5::389] = 0, 3e-41, 250.0
    return np.abs(values).astype(np.float32) if positive else values.astype(np.float32)


def read(optimizer, param):
    return read_moments(optimizer, param, optimizer.param_groups[0])


# ---- Transformer Engine's FusedAdam ----------------------------------------------------------------------------------


class Float8Tensor(torch.Tensor):
    """As Transformer Engine's: E4M3 bytes and an inverse scale of shape [1], under a nominal dtype of float32."""

    @staticmethod
    def __new__(cls, data, scale_inv):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data, scale_inv):
        self._data, self._scale_inv = data, scale_inv

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class FusedAdam(torch.optim.Optimizer):
    """Stores as Transformer Engine's does: states in the requested dtypes, scales beside them or in a Float8Tensor."""

    def __init__(self, params, moments, storage, adam_w_mode=True):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1, "bias_correction": True})
        self.adam_w_mode = 1 if adam_w_mode else 0
        self._scales = {}
        (param,) = self.param_groups[0]["params"]
        for name, value in moments.items():
            value = torch.from_numpy(value)
            largest = {"uint8": 448.0, "Float8Tensor": 448.0, "float16": torch.finfo(torch.float16).max / 2}
            if storage in largest:
                scale = (value.abs().max() / largest[storage]).reshape(1)
                scaled = value * torch.where(scale > 0, 1 / scale, 0.0)
                self._scales.setdefault(param, {})[name] = scale
                stored = scaled.half() if storage == "float16" else scaled.to(torch.float8_e4m3fn).view(torch.uint8)
                if storage == "Float8Tensor":
                    stored = Float8Tensor(stored, scale)
            else:
                stored = value.to(getattr(torch, storage))
            self.state[param][name] = stored
        self.state[param]["master_param"] = param.detach().clone()


FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"


def te_reference(values, storage):
    """What is read back, in float64."""
    if storage == "float32":
        return values.astype(float)
    if storage == "bfloat16":
        return torch.from_numpy(values).bfloat16().double().numpy()
    largest, dtype = (448.0, torch.float8_e4m3fn) if storage != "float16" else (32752.0, torch.float16)
    scale = np.float32(np.abs(values).max() / np.float32(largest))
    return torch.from_numpy(values * (np.float32(1) / scale)).to(dtype).double().numpy() * float(scale)


@pytest.mark.parametrize("storage", ["uint8", "Float8Tensor", "float16", "bfloat16", "float32"])
def test_transformer_engine_s_moments_are_read_as_the_values_they_stand_for(storage):
    moments = {"exp_avg": planted((24, 40), 0), "exp_avg_sq": planted((24, 40), 1, positive=True)}
    param = nn.Parameter(torch.ones(24, 40))
    found = read(FusedAdam([param], moments, storage), param)
    assert found.states.keys() == {"exp_avg", "exp_avg_sq"}  # not master_param
    for name, values in moments.items():
        np.testing.assert_allclose(found.states[name].double().numpy(), te_reference(values, storage), **EXACT)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "Float8Tensor"])
def test_transformer_engine_s_moments_that_are_all_zero_are_read_as_zeros_whatever_their_scale(storage, infinite):
    zeros = {"exp_avg": np.zeros((2, 3), np.float32), "exp_avg_sq": np.zeros((2, 3), np.float32)}
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = FusedAdam([param], zeros, storage)
    if infinite:
        for name in zeros:
            optimizer._scales[param][name].fill_(float("inf"))
    assert all((value == 0).all() for value in read(optimizer, param).states.values())


@pytest.mark.parametrize(("adam_w_mode", "decay"), [(True, 0.1), (False, 0.0)])
def test_transformer_engine_s_weight_decay_is_decoupled_in_its_adamw_mode(adam_w_mode, decay):
    moments = {"exp_avg": planted((4, 4), 0), "exp_avg_sq": planted((4, 4), 1, positive=True)}
    param = nn.Parameter(torch.ones(4, 4))
    found = read(FusedAdam([param], moments, "uint8", adam_w_mode), param)
    assert found.decoupled_weight_decay == decay
    assert found.denominator is found.states["exp_avg_sq"]


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


class Optimizer8bit(torch.optim.Optimizer):
    """Stores as bitsandbytes' does: indices into a code book, times the largest magnitude of each 256 values."""

    def __init__(self, params, name, moments, blockwise=True):
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "weight_decay": 0.1})
        self.optimizer_name = name
        (param,) = self.param_groups[0]["params"]
        state = self.state[param]
        state["step"] = 1
        self.values = []
        for number, values in enumerate(moments, start=1):
            book = np.sort(np.random.default_rng(number).uniform(-1, 1, 256)).astype(np.float32)
            book[128] = 0
            parts = values if values.ndim == 3 else values[None]
            stored = [quantize_blocks(part, book, 256 if blockwise else part.size) for part in parts]
            codes, absmax, values_read = (np.stack(column) for column in zip(*stored, strict=True))
            if values.ndim < 3:
                codes, absmax, values_read = codes[0], absmax[0], values_read[0]
            state[f"state{number}"] = torch.from_numpy(codes)
            state[f"qmap{number}"] = torch.from_numpy(book)
            state[f"absmax{number}" if blockwise else f"max{number}"] = torch.from_numpy(absmax)
            self.values.append(values_read)


Optimizer8bit.__module__ = "bitsandbytes.optim.optimizer"


def quantize_blocks(values, book, block):
    """Return codes, each block's largest magnitude, and what they stand for in float64."""
    flat = values.reshape(-1)
    absmax = np.array([np.abs(flat[i : i + block]).max() for i in range(0, flat.size, block)], np.float32)
    scale = np.repeat(absmax, block)[: flat.size]
    codes = np.abs(book[None] - (flat / scale)[:, None]).argmin(axis=1).astype(np.uint8)
    return codes.reshape(values.shape), absmax, (book[codes].astype(float) * scale).reshape(values.shape)


NAMES = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "momentum": ("momentum_buffer",),
    "lars": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}


@pytest.mark.parametrize("blockwise", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_states_are_read_as_the_values_they_stand_for(name, blockwise):
    moments = [planted((37, 40), seed, positive=seed == 1) for seed in range(len(NAMES[name]))]
    param = nn.Parameter(torch.ones(37, 40))
    optimizer = Optimizer8bit([param], name, moments, blockwise)
    found = read(optimizer, param).states
    assert tuple(found) == NAMES[name]
    for value, expected in zip(found.values(), optimizer.values, strict=True):
        np.testing.assert_allclose(value.double().numpy(), expected, **EXACT)


def test_bitsandbytes_ademamix_has_two_momenta():
    moments = [planted((2, 30, 40), 0), planted((30, 40), 1, positive=True)]
    param = nn.Parameter(torch.ones(30, 40))
    optimizer = Optimizer8bit([param], "ademamix", moments)
    found = read(optimizer, param)
    assert found.numerator is found.states["exp_avg"]
    np.testing.assert_allclose(found.states["exp_avg"].double().numpy(), optimizer.values[0][0], **EXACT)
    np.testing.assert_allclose(found.states["exp_avg_slow"].double().numpy(), optimizer.values[0][1], **EXACT)


def test_bitsandbytes_small_parameters_have_float32_states():
    param = nn.Parameter(torch.ones(3))
    optimizer = Optimizer8bit([param], "adam", [])
    optimizer.state[param].update(state1=torch.tensor([1.0, 2.0, 3.0]), state2=torch.tensor([1.0, 0.0, 2.0]))
    found = read(optimizer, param)
    assert (found.numerator.tolist(), found.denominator.tolist()) == ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0])
    assert found.decoupled_weight_decay == 0.1


@pytest.mark.parametrize(("name", "options"), [("AdamW8bit", {}), ("Lion8bit", {}), ("SGD8bit", {"momentum": 0.9})])
def test_bitsandbytes_itself_is_read(name, options):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    param = nn.Parameter(torch.ones(64, 128))
    optimizer = getattr(bitsandbytes.optim, name)([param], lr=1e-3, **options)
    param.grad = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.0, (64, 128)).astype(np.float32))
    optimizer.step()
    found = read(optimizer, param)
    factors = {"exp_avg": 0.1 if "Adam" in name else 0.01, "momentum_buffer": 1.0}
    for state, value in found.states.items():
        expected = param.grad * factors[state] if state in factors else param.grad.square() * 0.001
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0)


# ---- torchao ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_s_states_are_dequantized(name):
    from torchao import optim

    param = nn.Parameter(torch.ones(64, 64))
    optimizer = getattr(optim, name)([param], weight_decay=0.1)
    param.grad = torch.linspace(1, 2, 4096).view(64, 64)
    optimizer.step()
    found = read(optimizer, param)
    grad = param.grad if "AdamW" in name else param.grad + 0.1  # Adam's weight decay goes through the gradient
    torch.testing.assert_close(found.numerator, 0.1 * grad, rtol=0.2 if "4bit" in name else 0.07, atol=0)
    assert found.denominator is found.states["exp_avg_sq"]
    assert found.decoupled_weight_decay == (0.1 if "AdamW" in name else 0.0)


# ---- pytorch_optimizer -----------------------------------------------------------------------------------------------

# By optimizer: the denominator, and whether weight decay is decoupled by default.
COMMON = {
    "AdamP": ("exp_avg_sq", True),
    "AdaBelief": ("exp_avg_var", True),
    "AdaMax": ("exp_inf", False),
    "ADOPT": ("exp_avg_sq", False),
    "Lamb": ("exp_avg_sq", True),
    "Lion": (None, True),
    "Prodigy": ("exp_avg_sq", True),
    "RAdam": ("exp_avg_sq", True),
    "StableAdamW": ("exp_avg_sq", True),
    "Tiger": (None, True),
    "Yogi": ("exp_avg_sq", True),
}


def stepped(name, **options):
    """Return (optimizer, parameter) after two steps of an optimizer of pytorch_optimizer."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(8, 16))
    optimizer = getattr(pytest.importorskip("pytorch_optimizer"), name)([param], lr=0.01, **options)
    for _ in range(2):
        param.grad = torch.randn(8, 16)
        optimizer.step()
    return optimizer, param


@pytest.mark.parametrize("name", COMMON)
def test_pytorch_optimizer_s_numerators_and_denominators_are_found(name):
    optimizer, param = stepped(name, weight_decay=0.1)
    found, state = read(optimizer, param), optimizer.state[param]
    denominator, decoupled = COMMON[name]
    assert found.numerator is state["exp_avg"]
    assert found.denominator is (state[denominator] if denominator else None)
    assert found.decoupled_weight_decay == (0.1 if decoupled else 0.0)


@pytest.mark.parametrize("name", ["AdamP", "Lion", "RAdam", "Tiger"])
def test_pytorch_optimizer_s_nominal_changes_are_what_the_next_step_does(name):
    optimizer, param = stepped(name)
    before = {state: value.clone() for state, value in optimizer.state[param].items() if torch.is_tensor(value)}
    changes = {state: change(slice(None)) for state, change in read(optimizer, param).changes.items()}
    optimizer.step()
    assert "exp_avg" in changes
    for state, change in changes.items():
        torch.testing.assert_close(before[state] + change.view(8, 16), optimizer.state[param][state])


def test_unknown_averages_have_no_nominal_change():
    # ADOPT's exp_avg is of the normalised gradient.
    assert read(*stepped("ADOPT")).changes == {}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_a_weight_decay_without_the_factor_lr_is_given_per_lr(lr):
    optimizer, param = stepped("AdamP", weight_decay=0.1, weight_decouple=True, fixed_decay=True)
    optimizer.param_groups[0]["lr"] = lr
    assert float(read(optimizer, param).decoupled_weight_decay) == pytest.approx(10.0)


def test_what_decays_without_the_factor_lr_shrinks_the_parameter_so():
    (initial, plain), (_, decayed) = (adamp_step(weight_decay) for weight_decay in (0.0, 0.1))
    torch.testing.assert_close(plain - decayed, 0.1 * initial, rtol=1e-4, atol=1e-6)


def adamp_step(weight_decay):
    """Return a parameter before and after one step."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(4))
    before = param.detach().clone()
    adamp = pytest.importorskip("pytorch_optimizer").AdamP
    optimizer = adamp([param], lr=0.01, weight_decay=weight_decay, weight_decouple=True, fixed_decay=True)
    param.grad = torch.ones(4)
    optimizer.step()
    return before, param.detach()
