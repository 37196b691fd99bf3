"""What Transformer Engine offers beyond the conversion: fused layers."""

import copy
from typing import Any

import pytest
import te_cpu
import torch
from float8_models import DEVICE, Net, Wrapped, batches, net, te_plugin, trainer
from torch import nn

from lightning_stosign import StoSignConfig, StoSignMixin

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


# Fused layers


class Mixed(StoSignMixin, Wrapped):
    """With param groups."""

    stosign = StoSignConfig(weight_decay=0.1)


def sequence(norm: type[nn.Module] = nn.LayerNorm, bias: bool = True) -> Any:
    torch.manual_seed(0)
    model = Mixed(
        embed=nn.Linear(32, 16),
        one=nn.Sequential(norm(16), nn.Linear(16, 48, bias=bias)),
        mlp=nn.Sequential(
            nn.Identity(),
            norm(16),
            nn.Linear(16, 64, bias=bias),
            nn.GELU(approximate="tanh"),
            nn.Linear(64, 16, bias=bias),
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_layers_compute_and_learn_what_the_separate_ones_did(
    te: Any, no_fp8: None, norm: Any, bias: bool
) -> None:
    separate, fused = sequence(norm, bias), sequence(norm, bias)
    float8 = te_plugin(fuse=True)
    float8.convert_module(fused)
    inner = [module.inner for module in fused.modules() if hasattr(module, "inner")]
    assert [type(layer) for layer in inner] == [te.LayerNormLinear, te.LayerNormMLP]
    inputs = torch.randn(3, 5, 16)
    for name in ("one", "mlp"):
        truth = getattr(separate, name)(inputs)
        with float8.forward_context():
            output = getattr(fused, name)(inputs)
        torch.testing.assert_close(output, truth)
        for result in (truth, output):
            result.square().sum().backward()
    for (name, parameter), truth in zip(fused.named_parameters(), separate.parameters(), strict=True):
        assert (parameter.grad is None) == name.startswith("embed")
        torch.testing.assert_close(parameter.grad, truth.grad)


def test_fusing_changes_no_name_no_parameter_and_no_state(te: Any) -> None:
    model = sequence()
    before, keys, groups = dict(model.named_parameters()), list(model.state_dict()), model.param_groups()
    te_plugin(fuse=True).convert_module(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys
    sequence().load_state_dict(model.state_dict())
    assert [group["param_names"] for group in model.param_groups()] == [group["param_names"] for group in groups]
    inputs = torch.randn(16, 16)
    assert torch.equal(copy.deepcopy(model).mlp(inputs), model.mlp(inputs))


def test_a_copy_of_a_fused_model_has_parameters_of_its_own(te: Any) -> None:
    model = te_plugin(fuse=True).convert_module(sequence())
    twin, inputs = copy.deepcopy(model), torch.randn(16, 16)
    before = twin.mlp(inputs)
    with torch.no_grad():
        model.mlp[1].weight.zero_()
    assert torch.equal(twin.mlp(inputs), before)


def test_the_histories_of_fused_layers_are_saved(te: Any) -> None:
    model, float8 = sequence(), te_plugin(fuse=True, recipe="delayed")
    float8.convert_module(model)
    with float8.forward_context():
        model.mlp(torch.randn(16, 16))
    assert set(float8.state_dict()["layers"]) == {"mlp.4"}


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *call: None)
    return layer


@pytest.mark.parametrize(
    "layers",
    [
        (nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 16)),
        (nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 16)),
        (nn.LayerNorm((4, 16)), nn.Linear(16, 16)),
        (nn.LayerNorm(16), nn.Linear(16, 24)),
        (with_hook(nn.LayerNorm(16)), nn.Linear(16, 16)),
        (nn.LayerNorm(16), with_hook(nn.Linear(16, 16))),
        (nn.LayerNorm(16).eval(), nn.Linear(16, 16)),
    ],
)
def test_what_is_no_chain_is_not_fused(te: Any, layers: tuple[nn.Module, ...]) -> None:
    model = Wrapped(chain=nn.Sequential(*layers), other=nn.Linear(16, 16))
    te_plugin(fuse=True).convert_module(model)
    assert not any(hasattr(module, "inner") for module in model.modules())


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Tanh()])
def test_an_activation_that_te_lacks_leaves_the_second_layer_apart(te: Any, activation: nn.Module) -> None:
    model = Wrapped(chain=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), activation, nn.Linear(32, 16)))
    te_plugin(fuse=True).convert_module(model)
    assert isinstance(model.chain[1].inner, te.LayerNormLinear)
    assert model.chain[2] is activation
    assert isinstance(model.chain[3], te.Linear)


def test_excluded_layers_are_not_fused(te: Any) -> None:
    model = sequence()
    te_plugin(fuse=True, exclude=["one.0", "mlp"]).convert_module(model)
    assert not any(hasattr(module, "inner") for module in model.modules())
    assert isinstance(model.one[1], te.Linear)


def test_fused_parameters_that_come_from_meta_can_be_initialised(te: Any) -> None:
    with torch.device("meta"):
        model = sequence()
    te_plugin(fuse=True).convert_module(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if list(module.parameters(recurse=False)) and hasattr(module, "kind"):
            module.reset_parameters()
    model.one[1].reset_parameters()
    assert torch.equal(model.one[0].weight, torch.ones(16))
    assert model.one[1].weight.abs().max() <= 0.25


def test_a_fused_run_trains_where_the_separate_one_goes(te: Any, no_fp8: None) -> None:
    class Stack(Net):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64, bias=False))

    models = [net(model=Stack), net(model=Stack)]
    trainer(te_plugin(fuse=True), steps=4).fit(models[0], batches())
    trainer(steps=4).fit(models[1], batches())
    assert models[0].losses == pytest.approx(models[1].losses, rel=1e-5)


def test_a_shared_layer_under_delayed_scaling_is_warned_about(te: Any) -> None:
    shared = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match=r"layer one = two has several names.*recipe='current'"):
        te_plugin(recipe="delayed").convert_module(Wrapped(one=shared, two=shared))


CAPABILITY = {"mxfp8": te_cpu.B200, "nvfp4": te_cpu.B200}


@pytest.mark.gpu
@pytest.mark.parametrize("feature", ["plain", "pad", "fuse", "quantized_weights"])
@pytest.mark.parametrize("recipe", ["delayed", "current", "block", "mxfp8", "nvfp4"])
def test_every_recipe_computes_what_torch_computes(te: Any, on_gpu: Any, recipe: str, feature: str) -> None:
    on_gpu(CAPABILITY.get(recipe, te_cpu.H100))
    flags: Any = {} if feature == "plain" else {feature: True}
    try:
        float8 = te_plugin(recipe=recipe, weights_dtype="bfloat16", **flags)
    except ValueError as error:  # not for this GPU, or not together
        pytest.skip(str(error))
    size = 200 if feature == "pad" else 256
    torch.manual_seed(0)
    model = Wrapped(chain=nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size)), other=nn.Linear(size, size))
    model.bfloat16()
    truth = copy.deepcopy(model).to(DEVICE)
    float8.convert_module(model)
    model.to(DEVICE)
    inputs = torch.randn(3, 7, size, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(2):  # delayed scaling learns its scales in the first call
        with float8.forward_context():
            output = model.other(model.chain(inputs))
        output.float().square().mean().backward()
    expected = truth.other(truth.chain(inputs))
    expected.float().square().mean().backward()
    assert ((output - expected).norm() / expected.norm()).item() < 0.3
    gradient, exact = model.chain[1].weight.grad / 2, truth.chain[1].weight.grad
    assert ((gradient - exact).norm() / exact.norm()).item() < 0.4
