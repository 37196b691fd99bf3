import copy
import sys
from typing import Any

import pytest
import te_stand_in
import torch
from float8_models import BATCH, Net, batches, net, trainer
from torch import nn

from lightning_stosign.precision import Float8Precision, te_backend
from lightning_stosign.precision.te_backend import TransformerEngineBackend

recipes = te_stand_in.recipes

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with an H100 and Transformer Engine, as far as the package sees; the Trainer still runs on the CPU."""
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te_stand_in)
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: (9, 0))
    monkeypatch.setattr(TransformerEngineBackend, "device_types", ("cpu",))
    te_stand_in.AUTOCASTS.clear()
    return te_stand_in


def plugin(**arguments: Any) -> Float8Precision:
    return Float8Precision(**{"backend": "transformer-engine", **arguments})


# Recipes


@pytest.mark.parametrize(
    ("name", "recipe_type", "capability", "fp8_format"),
    [
        ("delayed", "DelayedScaling", (8, 9), "HYBRID"),
        ("current", "Float8CurrentScaling", (8, 9), "HYBRID"),
        ("block", "Float8BlockScaling", (9, 0), "E4M3"),
        ("mxfp8", "MXFP8BlockScaling", (10, 0), "E4M3"),
    ],
)
def test_a_name_stands_for_the_recipe_of_te(
    te: Any, monkeypatch: Any, name: str, recipe_type: str, capability: tuple, fp8_format: str
) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: capability)
    with plugin(recipe=name).forward_context():
        pass
    recipe = te.AUTOCASTS[-1].recipe
    assert type(recipe) is getattr(recipes, recipe_type)
    assert recipe.fp8_format is getattr(recipes.Format, fp8_format)


def test_a_recipe_object_is_passed_through(te: Any) -> None:
    recipe = recipes.DelayedScaling(amax_history_len=4)
    with plugin(recipe=recipe).forward_context():
        pass
    assert te.AUTOCASTS[-1].recipe is recipe


@pytest.mark.parametrize(
    ("name", "capability"), [("block", (8, 9)), ("mxfp8", (9, 0)), ("mxfp8", (12, 0)), ("mxfp8", (12, 1))]
)
def test_a_recipe_that_the_gpu_lacks_is_refused(te: Any, monkeypatch: Any, name: str, capability: tuple) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: capability)
    has = "{}.{}".format(*capability)
    with pytest.raises(ValueError, match=rf"recipe='{name}' needs a CUDA device of compute capability .* has {has}"):
        plugin(recipe=name)


@pytest.mark.parametrize(("capability", "backend"), [((9, 0), "transformer-engine"), ((8, 0), "torchao")])
def test_auto_takes_te_where_it_runs(te: Any, monkeypatch: Any, capability: tuple, backend: str) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: capability)
    assert Float8Precision().backend == backend


def test_auto_takes_torchao_for_its_own_recipe(te: Any) -> None:
    assert Float8Precision("rowwise").backend == "torchao"


# The forward context


def test_steps_run_inside_one_enabled_autocast(te: Any) -> None:
    model = net()
    run = trainer(plugin(), steps=2)
    run.fit(model, batches())
    assert len(te.AUTOCASTS) == 2
    assert all(call.enabled and call.amax_reduction_group is None for call in te.AUTOCASTS)
    assert model.first.amax_history  # the layers saw it
    run.test(model, batches(1), verbose=False)
    assert len(te.AUTOCASTS) == 3


@pytest.mark.parametrize(("weights_dtype", "expected"), [("float32", False), ("bfloat16", torch.bfloat16)])
def test_other_operations_are_autocast_to_bfloat16_weights_only(te: Any, weights_dtype: str, expected: Any) -> None:
    model = net()
    trainer(plugin(weights_dtype=weights_dtype), steps=1).fit(model, batches())
    assert te.AUTOCASTS[0].torch_autocast == expected
    assert model.first.weight.dtype == model.dtype == getattr(torch, weights_dtype)


def test_amax_is_reduced_over_the_world(te: Any, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with plugin().forward_context():
            pass
        assert te.AUTOCASTS[-1].amax_reduction_group is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def test_an_old_te_is_asked_through_its_old_name(te: Any, monkeypatch: Any) -> None:
    calls = []

    def fp8_autocast(
        enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None
    ) -> Any:
        calls.append((enabled, fp8_recipe, fp8_group))
        return autocast(enabled, calibrating, fp8_recipe, fp8_group)

    autocast = te.autocast
    monkeypatch.setattr(te, "fp8_autocast", fp8_autocast, raising=False)
    recipe = recipes.Float8CurrentScaling()
    with plugin(recipe=recipe).forward_context():
        assert not calls  # not while the new name is there
    monkeypatch.delattr(te, "autocast")
    with plugin(recipe=recipe).forward_context():
        pass
    assert calls == [(True, recipe, None)]


def test_a_run_on_another_device_is_refused(te: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(TransformerEngineBackend, "device_types", ("cuda",))
    with pytest.raises(RuntimeError, match=r"runs on cuda, and the model is on 'cpu'.*backend='torchao'"):
        trainer(plugin()).fit(net(), batches())


# What is converted


def test_linear_layers_and_norms_become_te_layers(te: Any) -> None:
    model = net()
    assert plugin().convert_module(model) is model
    kinds = {name: type(child) for name, child in model.named_children()}
    assert kinds == {
        "first": te.Linear,
        "norm": te.LayerNorm,
        "middle": te.Linear,
        "last": te.Linear,
        "head": nn.Linear,
    }
    assert model.first.use_bias
    assert not model.middle.use_bias
    assert (model.last.in_features, model.last.out_features) == (64, 16)


@pytest.mark.parametrize(
    ("norm", "kind", "eps"),
    [
        (nn.LayerNorm(16, eps=1e-3), "LayerNorm", 1e-3),
        (nn.RMSNorm(16, eps=1e-3), "RMSNorm", 1e-3),
        (nn.RMSNorm(16), "RMSNorm", torch.finfo(torch.float32).eps),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_compute_what_torch_computes(te: Any, norm: nn.Module, kind: str, eps: float, dtype: str) -> None:
    norm = copy.deepcopy(norm).to(getattr(torch, dtype))
    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "norm": norm})
    inputs = 1e-3 * torch.randn(8, 16, dtype=getattr(torch, dtype))
    truth = norm(inputs)
    plugin(weights_dtype=dtype).convert_module(model)
    assert type(model["norm"]) is getattr(te, kind)
    assert model["norm"].eps == eps
    torch.testing.assert_close(model["norm"](inputs), truth)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(16, elementwise_affine=False),
        nn.LayerNorm((4, 16)),
        nn.LayerNorm(16, bias=False),
        nn.RMSNorm(16, elementwise_affine=False),
        nn.RMSNorm((4, 16)),
        nn.BatchNorm1d(16),
    ],
)
def test_norms_that_te_cannot_represent_stay(te: Any, norm: nn.Module) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "norm": norm})
    plugin().convert_module(model)
    assert model["norm"] is norm


def test_excluded_linears_and_norms_stay(te: Any) -> None:
    model = net()
    plugin(exclude=["norm", "la*"]).convert_module(model)
    assert type(model.norm) is nn.LayerNorm
    assert type(model.last) is nn.Linear
    assert type(model.middle) is te.Linear


@pytest.mark.parametrize(("recipe", "capability", "fits"), [("block", (9, 0), 128), ("mxfp8", (10, 0), 32)])
def test_block_recipes_have_larger_size_rules(
    te: Any, monkeypatch: Any, recipe: str, capability: tuple, fits: int
) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: capability)
    model = nn.ModuleDict({"yes": nn.Linear(fits, fits), "no": nn.Linear(fits, fits + 16)})
    with pytest.warns(UserWarning, match=f"multiples of {fits}: no "):
        plugin(recipe=recipe).convert_module(model)
    assert type(model["yes"]) is te.Linear
    assert type(model["no"]) is nn.Linear


def test_layers_with_other_sizes_stay_and_one_warning_names_them(te: Any) -> None:
    model = nn.ModuleDict({"fits": nn.Linear(16, 16), "wide": nn.Linear(24, 16), "odd": nn.Linear(16, 24)})
    with pytest.warns(UserWarning, match="multiples of 16: wide .24 -> 16., odd .16 -> 24.") as warnings:
        plugin().convert_module(model)
    assert len(warnings) == 1


def test_a_second_conversion_changes_nothing(te: Any, recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    plugin(exclude=["head"]).convert_module(model)
    before = dict(model.named_modules())
    plugin(exclude=["head"]).convert_module(model)
    assert dict(model.named_modules()) == before
    assert not recwarn.list


def test_te_layers_of_the_user_are_enough_and_keep_their_extra_state(te: Any) -> None:
    model = nn.ModuleDict({"own": te.Linear(16, 16, device="cpu")})
    plugin().convert_module(model)
    assert "own._extra_state" in model.state_dict()


# What the layers keep


def test_parameters_are_the_very_same_objects(te: Any) -> None:
    model = net()
    model.first.bias.requires_grad_(False)
    before = dict(model.named_parameters())
    plugin().convert_module(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert not model.first.bias.requires_grad


def test_weights_stay_tied(te: Any) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 16), "head": nn.Linear(16, 32, bias=False)})
    model["head"].weight = model["embedding"].weight
    plugin().convert_module(model)
    assert type(model["head"]) is te.Linear
    assert model["head"].weight is model["embedding"].weight


def test_modes_hooks_and_attributes_stay(te: Any) -> None:
    model = net()
    model.first.eval()
    model.norm.eval()
    model.norm.label = "label"
    seen: list[nn.Module] = []
    handle = model.first.register_forward_hook(lambda module, *rest: seen.append(module))
    model.norm.register_forward_pre_hook(lambda module, *rest: seen.append(module))
    plugin().convert_module(model)
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
    plugin().convert_module(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_meta_device_model_stays_on_meta(te: Any) -> None:
    with torch.device("meta"):
        model = Net()
    plugin(weights_dtype="bfloat16").convert_module(model)
    assert type(model.first) is te.Linear
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_te_is_told_the_type_of_the_weights(te: Any) -> None:
    model = net()
    plugin(weights_dtype="bfloat16").convert_module(model)
    assert model.first.params_dtype == torch.bfloat16


def test_training_goes_where_torch_goes(te: Any) -> None:
    """The stand-in computes in fp32, so that all that the plugin does around the layers must cancel out."""
    models = [net(), net()]
    trainer(plugin(), steps=6).fit(models[0], batches())
    trainer(steps=6).fit(models[1], batches())
    assert models[0].losses == models[1].losses


# Checkpoints


def test_state_dict_keys_are_those_of_the_unconverted_model(te: Any) -> None:
    model = net()
    keys = list(model.state_dict())
    plugin().convert_module(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(net(seed=7).state_dict())
    assert torch.equal(model.first.weight, net(seed=7).first.weight)


def test_a_key_that_is_really_missing_is_still_reported(te: Any) -> None:
    model = net()
    plugin().convert_module(model)
    state = model.state_dict()
    del state["first.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"first.weight"\.'):
        model.load_state_dict(state)


@pytest.mark.parametrize("save_weights_only", [False, True])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_checkpoint_loads_into_converted_and_unconverted_models(
    te: Any, recipe: str, save_weights_only: bool, tmp_path: Any, monkeypatch: Any
) -> None:
    if recipe == "delayed":
        monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    model = net()
    run = trainer(plugin(recipe=recipe), steps=2)
    run.fit(model, batches())
    path = tmp_path / "two.ckpt"
    run.save_checkpoint(path, weights_only=save_weights_only)
    fresh = Net.load_from_checkpoint(path, weights_only=True)
    assert type(fresh.first) is nn.Linear
    assert torch.equal(fresh.first.weight, model.first.weight)
    run.test(model, batches(1), ckpt_path=path, verbose=False, weights_only=True)
    trainer().test(net(), batches(1), ckpt_path=path, verbose=False, weights_only=True)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_run_resumes_bit_for_bit_with_its_scaling_histories(
    te: Any, recipe: str, tmp_path: Any, monkeypatch: Any
) -> None:
    if recipe == "delayed":
        monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    uninterrupted = net()
    trainer(plugin(recipe=recipe), steps=6).fit(uninterrupted, batches(1))
    first = trainer(plugin(recipe=recipe), steps=2)
    first.fit(net(), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = net(seed=7)
    trainer(plugin(recipe=recipe), steps=6).fit(resumed, batches(1), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert resumed.losses == uninterrupted.losses[2:]
    if recipe == "delayed":
        assert len(uninterrupted.first.amax_history) == 6
        assert resumed.first.amax_history == uninterrupted.first.amax_history


def test_te_s_refusal_to_unpickle_reaches_the_user(te: Any, tmp_path: Any) -> None:
    first = trainer(plugin(recipe="delayed"), steps=2)
    first.fit(net(), batches())
    first.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"):
        trainer(plugin(recipe="delayed"), steps=4).fit(net(), batches(), ckpt_path=tmp_path / "two.ckpt")
    # A stateless recipe has no use for the histories, and does not ask.
    trainer(plugin(recipe="current"), steps=4).fit(net(), batches(), ckpt_path=tmp_path / "two.ckpt")


def test_histories_of_layers_that_are_no_longer_in_fp8_are_reported(te: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    first = trainer(plugin(recipe="delayed"), steps=2)
    first.fit(net(), batches())
    first.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match=r"histories of layers that are not in FP8 now: \['middle'\]"):
        trainer(plugin(recipe="delayed", exclude=["middle"]), steps=4).fit(
            net(), batches(), ckpt_path=tmp_path / "two.ckpt"
        )


# The stand-in itself, and the real thing


def test_the_stand_in_enforces_the_size_rules_of_te(te: Any) -> None:
    model = net()
    float8 = plugin()
    float8.convert_module(model)
    model(torch.randn(BATCH + 1, 32))  # outside of autocast anything goes
    with float8.forward_context(), pytest.raises(ValueError, match="multiples of 8 and 16"):
        model(torch.randn(BATCH + 1, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_real_transformer_engine_trains_and_its_checkpoint_loads(
    recipe: str, weights_dtype: str, tmp_path: Any
) -> None:
    if (obstacle := te_backend.missing_for_transformer_engine()) is not None:
        pytest.skip(obstacle)
    model = net()
    run = trainer(plugin(recipe=recipe, weights_dtype=weights_dtype), steps=40, accelerator="gpu")
    run.fit(model, batches(4))
    assert type(model.first).__module__.startswith("transformer_engine.pytorch")
    assert sum(model.losses[-4:]) < 0.5 * sum(model.losses[:4])
    run.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Net.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(fresh.first.weight.cpu(), model.first.weight.float().cpu())
