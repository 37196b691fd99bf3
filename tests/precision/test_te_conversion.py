import copy
from typing import Any

import pytest
import te_cpu
import torch
from float8_models import Net, batches, net, te_plugin, trainer
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


def test_linear_layers_and_norms_become_te_layers(te: Any) -> None:
    model = net()
    assert te_plugin().convert_module(model) is model
    kinds = {"first": te.Linear, "norm": te.LayerNorm, "middle": te.Linear, "last": te.Linear, "head": nn.Linear}
    assert all(isinstance(child, kinds[name]) for name, child in model.named_children())
    assert model.first.use_bias
    assert not model.middle.use_bias
    assert (model.last.in_features, model.last.out_features) == (64, 16)


@pytest.mark.parametrize(
    ("norm", "kind", "eps"),
    [
        (nn.LayerNorm(16, eps=1e-3), "LayerNorm", 1e-3),
        (nn.LayerNorm((4, 16), eps=1), "LayerNorm", 1.0),
        (nn.RMSNorm((4, 16), eps=1e-3), "RMSNorm", 1e-3),
        (nn.RMSNorm(16, eps=1e-3), "RMSNorm", 1e-3),
        (nn.RMSNorm(16), "RMSNorm", torch.finfo(torch.float32).eps),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_compute_what_torch_computes(te: Any, norm: nn.Module, kind: str, eps: float, dtype: str) -> None:
    norm = copy.deepcopy(norm).to(getattr(torch, dtype))
    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "norm": norm})
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    inputs = 1e-3 * torch.randn(8, 4, 16, dtype=getattr(torch, dtype))
    truth = norm(inputs)
    te_plugin(weights_dtype=dtype).convert_module(model)
    assert isinstance(model["norm"], getattr(te, kind))
    assert model["norm"].eps == eps
    torch.testing.assert_close(model["norm"](inputs), truth)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(16, elementwise_affine=False),
        nn.LayerNorm(16, bias=False),
        nn.RMSNorm(16, elementwise_affine=False),
        nn.BatchNorm1d(16),
    ],
)
def test_norms_whose_parameters_would_be_new_stay(te: Any, norm: nn.Module) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "norm": norm})
    te_plugin().convert_module(model)
    assert model["norm"] is norm


def test_excluded_linears_and_norms_stay(te: Any) -> None:
    model = net()
    te_plugin(exclude=["norm", "la*"]).convert_module(model)
    assert type(model.norm) is nn.LayerNorm
    assert type(model.last) is nn.Linear
    assert isinstance(model.middle, te.Linear)


@pytest.mark.parametrize(("recipe", "capability", "fits"), [("block", (9, 0), 128), ("mxfp8", (10, 0), 32)])
def test_block_recipes_have_larger_size_rules(te: Any, recipe: str, capability: tuple, fits: int) -> None:
    model = nn.ModuleDict({"yes": nn.Linear(fits, fits), "no": nn.Linear(fits, fits + 16)})
    with te_cpu.gpu(capability), pytest.warns(UserWarning, match=f"multiples of {fits}: no "):
        te_plugin(recipe=recipe).convert_module(model)
    assert isinstance(model["yes"], te.Linear)
    assert type(model["no"]) is nn.Linear


def test_layers_with_other_sizes_stay_and_one_warning_names_them(te: Any) -> None:
    model = nn.ModuleDict({"fits": nn.Linear(16, 16), "wide": nn.Linear(24, 16), "odd": nn.Linear(16, 24)})
    with pytest.warns(UserWarning, match="multiples of 16: wide .24 -> 16., odd .16 -> 24.") as warnings:
        te_plugin().convert_module(model)
    assert len(warnings) == 1


def test_a_second_conversion_changes_nothing(te: Any, recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    te_plugin(exclude=["head"]).convert_module(model)
    before = dict(model.named_modules())
    te_plugin(exclude=["head"]).convert_module(model)
    assert dict(model.named_modules()) == before
    assert not recwarn.list


def test_te_layers_of_the_user_are_enough_and_keep_their_extra_state(te: Any) -> None:
    model = nn.ModuleDict({"own": te.Linear(16, 16, device="cpu")})
    te_plugin().convert_module(model)
    assert "own._extra_state" in model.state_dict()


# What the layers keep


def test_parameters_are_the_very_same_objects(te: Any) -> None:
    model = net()
    model.first.bias.requires_grad_(False)
    before = dict(model.named_parameters())
    te_plugin().convert_module(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert not model.first.bias.requires_grad


def test_weights_stay_tied(te: Any) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 16), "head": nn.Linear(16, 32, bias=False)})
    model["head"].weight = model["embedding"].weight
    te_plugin().convert_module(model)
    assert isinstance(model["head"], te.Linear)
    assert model["head"].weight is model["embedding"].weight


def test_modes_hooks_and_attributes_stay(te: Any) -> None:
    model = net()
    model.first.eval()
    model.norm.eval()
    model.norm.label = "label"
    seen: list[nn.Module] = []
    handle = model.first.register_forward_hook(lambda module, *rest: seen.append(module))
    model.norm.register_forward_pre_hook(lambda module, *rest: seen.append(module))
    te_plugin().convert_module(model)
    assert not model.first.training
    assert not model.norm.training
    assert model.middle.training
    assert model.norm.label == "label"
    assert model.norm.normalized_shape == (64,)
    model(torch.randn(8, 32))
    assert seen == [model.first, model.norm]
    handle.remove()
    model(torch.randn(8, 32))
    assert seen == [model.first, model.norm, model.norm]


def test_conversion_draws_nothing_from_the_global_rng(te: Any) -> None:
    model = net()
    state = torch.get_rng_state()
    te_plugin().convert_module(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_meta_device_model_stays_on_meta(te: Any) -> None:
    with torch.device("meta"):
        model = Net()
    te_plugin(weights_dtype="bfloat16").convert_module(model)
    assert isinstance(model.first, te.Linear)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_training_goes_where_torch_goes(te: Any, no_fp8: None) -> None:
    models = [net(), net()]
    trainer(te_plugin(), steps=6).fit(models[0], batches())
    trainer(steps=6).fit(models[1], batches())
    assert models[0].losses == pytest.approx(models[1].losses, rel=1e-5)
