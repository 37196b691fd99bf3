"""Weights that are kept in FP8 only: made, loaded, initialised, trained and resumed as such."""

import copy
import importlib
from typing import Any

import pytest
import te_cpu
import torch
from float8_models import Net, Wide, Wrapped, batches, net, te_plugin, trainer
from lightning.pytorch import LightningModule
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")

CAPABILITY = {"current": te_cpu.H100, "block": te_cpu.H100, "mxfp8": te_cpu.B200, "nvfp4": te_cpu.B200}


def test_quantised_weights_start_from_the_values_of_the_model(te: Any) -> None:
    model = net()
    initial = copy.deepcopy(model.state_dict())
    model.middle.requires_grad_(False)
    state = torch.get_rng_state()
    float8 = te_plugin(quantized_weights=True)
    float8.convert_module(model)
    for layer in (model.first, model.middle, model.last):
        assert isinstance(layer.weight, te.QuantizedTensor)
        assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(model.first.weight.get_high_precision_init_val(), initial["first.weight"])
    assert not model.middle.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.first.weight.dequantize(), initial["first.weight"], rtol=1 / 16, atol=1e-3)


def test_a_state_dict_holds_plain_weights(te: Any) -> None:
    model = te_plugin(quantized_weights=True).convert_module(net())
    state = model.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    fresh = net(seed=7)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.first.weight, model.first.weight.dequantize())
    model.load_state_dict(net(seed=8).state_dict())
    torch.testing.assert_close(model.first.weight.dequantize(), net(seed=8).first.weight.data, rtol=1 / 16, atol=1e-3)


def test_tied_weights_are_not_quantised(te: Any) -> None:
    model = Wrapped(embedding=nn.Embedding(32, 16), head=nn.Linear(16, 32, bias=False), other=nn.Linear(16, 16))
    model.head.weight = model.embedding.weight
    te_plugin(quantized_weights=True).convert_module(model)
    assert isinstance(model.head, te.Linear)
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.other.weight, te.QuantizedTensor)


def test_quantised_weights_on_meta_stay_there(te: Any) -> None:
    with torch.device("meta"):
        model = Net()
    te_plugin(quantized_weights=True).convert_module(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# Models from the meta device


def on_meta(model: type[LightningModule] = Net) -> Any:
    with torch.device("meta"):
        made = model()
    made.middle.requires_grad_(False)
    te_plugin(quantized_weights=True).convert_module(made)
    return made


def test_a_state_dict_on_meta_has_the_keys_of_the_plain_model(te: Any) -> None:
    assert list(on_meta().state_dict()) == list(net().state_dict())


def test_a_materialised_model_loads_its_weights_into_fp8(te: Any) -> None:
    model, truth = on_meta(), net(seed=3)
    state = torch.get_rng_state()
    model.to_empty(device="cpu")
    model.load_state_dict(truth.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("first", "middle", "last"):
        layer = getattr(model, name)
        assert isinstance(layer.weight, te.QuantizedTensor)
        exact = getattr(truth, name).weight.data
        torch.testing.assert_close(layer.weight.dequantize(), exact, rtol=1 / 16, atol=1e-3)
        assert torch.equal(layer.weight.get_high_precision_init_val(), exact)
        assert layer.weight.requires_grad == (name != "middle")


@pytest.mark.parametrize("meta", [True, False])
def test_assigned_weights_are_quantised_too(te: Any, meta: bool) -> None:
    model = on_meta() if meta else te_plugin(quantized_weights=True).convert_module(net())
    truth = net(seed=4)
    state = torch.get_rng_state()
    model.load_state_dict(truth.state_dict(), assign=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model.first.weight, te.QuantizedTensor)
    torch.testing.assert_close(model.first.weight.dequantize(), truth.first.weight.data, rtol=1 / 16, atol=1e-3)
    assert torch.equal(model.first.weight.get_high_precision_init_val(), truth.first.weight)
    assert torch.equal(model.first.bias, truth.first.bias)


def test_a_materialised_model_is_initialised_as_torch_does(te: Any) -> None:
    model = on_meta()
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.first.reset_parameters()
    model.middle.reset_parameters()
    torch.manual_seed(5)
    first, middle = nn.Linear(32, 64), nn.Linear(64, 64, bias=False)
    assert torch.equal(model.first.bias, first.bias)
    for layer, truth in ((model.first, first), (model.middle, middle)):
        assert isinstance(layer.weight, te.QuantizedTensor)
        assert torch.equal(layer.weight.get_high_precision_init_val(), truth.weight)
    assert not model.middle.weight.requires_grad


def test_plain_weights_are_initialised_in_place_as_torch_does(te: Any) -> None:
    model, truth = net(), net(seed=1)
    te_plugin().convert_module(model)
    model.first.bias.requires_grad_(False)
    before = dict(model.named_parameters())
    torch.manual_seed(9)
    for layer in (model.first, model.norm, model.middle, model.last):
        layer.reset_parameters()
    torch.manual_seed(9)
    for layer in (truth.first, truth.norm, truth.middle, truth.last):
        layer.reset_parameters()
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], value) for name, value in truth.named_parameters() if "head" not in name)
    assert not model.first.bias.requires_grad


# Loaded, trained, resumed


def test_master_weights_start_from_what_was_loaded(te: Any) -> None:
    model = te_plugin(quantized_weights=True).convert_module(net())
    model.load_state_dict(net(seed=8).state_dict())
    assert torch.equal(model.first.weight.get_high_precision_init_val(), net(seed=8).first.weight)
    model.first.weight.clear_high_precision_init_val()
    model.load_state_dict(net(seed=9).state_dict())
    assert model.first.weight.get_high_precision_init_val() is None


class WideOnly(Wide):
    """Trains the one layer that every recipe takes."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.middle.requires_grad_(True)

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.middle.parameters(), lr=0.5, momentum=0.9)


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", CAPABILITY)
def test_a_run_resumes_bit_for_bit_also_after_a_validation(
    te: Any, on_gpu: Any, since: Any, recipe: str, weights_dtype: str, tmp_path: Any
) -> None:
    on_gpu(CAPABILITY[recipe])
    if recipe == "nvfp4":
        since("2.16", "a tensor that is moved keeps its bits")
        options: Any = {"name": "nvfp4", "disable_rht": True, "disable_stochastic_rounding": True}
    else:
        options = recipe

    def plugin() -> Any:
        return te_plugin(
            recipe=options, quantized_weights=True, weights_dtype=weights_dtype, exclude=["first", "last", "head"]
        )

    uninterrupted = net(model=WideOnly)
    trainer(plugin(), steps=5).fit(uninterrupted, batches(1))
    first = trainer(plugin(), steps=2)
    first.fit(net(model=WideOnly), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = net(seed=7, model=WideOnly)
    run = trainer(plugin(), steps=5)
    run.validate(resumed, batches(1), verbose=False)
    run.fit(resumed, batches(1), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert isinstance(resumed.middle.weight, te.QuantizedTensor)
    assert resumed.losses == uninterrupted.losses[2:]
    assert len(set(resumed.losses)) == 3


class WithMasterWeights(WideOnly):
    """TE's own optimizer keeps float32 weights, whose small steps FP8 would lose."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
        return optimizers.FusedAdam(self.middle.parameters(), lr=1e-4, master_weights=True)


def test_te_s_optimizer_trains_them_through_master_weights(te: Any) -> None:
    options: Any = {"recipe": "current", "exclude": ["first", "last", "head"]}
    quantised, plain = net(model=WithMasterWeights), net(model=WithMasterWeights)
    trainer(te_plugin(quantized_weights=True, **options), steps=80).fit(quantised, batches(1))
    trainer(te_plugin(**options), steps=80).fit(plain, batches(1))
    assert isinstance(quantised.middle.weight, te.QuantizedTensor)
    # TE's master weights start from the rounded values, and take a few steps to leave them.
    gain, full = (model.losses[0] - model.losses[-1] for model in (quantised, plain))
    assert quantised.losses[0] == plain.losses[0]
    assert gain > 0.85 * full > 0


def test_a_checkpoint_of_another_recipe_s_bits_gives_its_values(te: Any, on_gpu: Any, tmp_path: Any) -> None:
    on_gpu(te_cpu.B200)
    options: Any = {"quantized_weights": True, "exclude": ["first", "last", "head"]}
    first = trainer(te_plugin(recipe="block", **options), steps=2)
    trained = net(model=WideOnly)
    first.fit(trained, batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    model = net(seed=7, model=WideOnly)
    trainer(te_plugin(recipe="mxfp8", **options), steps=2).fit(model, batches(1), ckpt_path=tmp_path / "two.ckpt")
    assert type(model.middle.weight).__name__.startswith("MXFP8")
    exact = trained.middle.weight.dequantize()
    torch.testing.assert_close(model.middle.weight.dequantize(), exact, rtol=1 / 8, atol=1e-3)


# Recipes that do not fit together


@pytest.mark.parametrize(
    ("made_for", "recipe", "refused"),
    [
        ("Float8CurrentScaling", "current", False),
        ("Float8CurrentScaling", "delayed", True),
        ("DelayedScaling", "current", True),
        ("Float8CurrentScaling", "mxfp8", True),
        ("MXFP8BlockScaling", "mxfp8", False),
        ("MXFP8BlockScaling", "nvfp4", True),
    ],
)
def test_a_recipe_that_cannot_compute_with_stored_weights_is_refused_at_conversion(
    te: Any, on_gpu: Any, made_for: str, recipe: str, refused: bool
) -> None:
    on_gpu(te_cpu.B200)
    kept = getattr(importlib.import_module("transformer_engine.common.recipe"), made_for)()
    with te.quantized_model_init(enabled=True, recipe=kept):
        own = te.Linear(128, 128, device="cpu", params_dtype=torch.bfloat16)
    model = Wrapped(own=own, other=nn.Linear(128, 128))
    plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16")
    if refused:
        with pytest.raises(ValueError, match=rf"own\.weight is stored in the format of {made_for}"):
            plugin.convert_module(model)
        assert type(model.other) is nn.Linear
    else:
        plugin.convert_module(model)
        with plugin.forward_context():
            assert own(torch.randn(32, 128, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("fuse", [True, False])
def test_a_second_recipe_takes_the_layers_of_the_first_or_refuses_them_at_conversion(
    te: Any, on_gpu: Any, fuse: bool
) -> None:
    on_gpu(te_cpu.B200)
    model = Wrapped(chain=nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 64)))
    te_plugin(recipe="current", fuse=fuse).convert_module(model)
    finer = te_plugin(recipe="mxfp8")
    finer.convert_module(model)
    with finer.forward_context():
        assert model.chain(torch.randn(5, 128)).shape == (5, 64)  # 5 tokens become 32
    with pytest.raises(ValueError, match=r"chain\.1 was converted for another recipe, and its 128 inputs and 64 out"):
        te_plugin(recipe="block").convert_module(model)
