import importlib
import re
from typing import Any

import pytest
import te_cpu
import torch
from float8_models import batches, net, te_plugin, trainer
from torch import nn

from lightning_stosign.precision import Float8Precision
from lightning_stosign.precision.te_backend import TransformerEngineBackend

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


@pytest.fixture
def recipes(te: Any) -> Any:
    return importlib.import_module("transformer_engine.common.recipe")


def state() -> Any:
    """What an autocast around this call has set."""
    return importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager


@pytest.mark.parametrize(
    ("name", "recipe_type", "capability", "fp8_format"),
    [
        ("delayed", "DelayedScaling", (8, 9), "HYBRID"),
        ("current", "Float8CurrentScaling", (8, 9), "HYBRID"),
        ("block", "Float8BlockScaling", (9, 0), "E4M3"),
        ("mxfp8", "MXFP8BlockScaling", (10, 0), "E4M3"),
        ("nvfp4", "NVFP4BlockScaling", (12, 0), "E4M3"),
    ],
)
def test_a_name_stands_for_the_recipe_of_te(
    recipes: Any, name: str, recipe_type: str, capability: tuple, fp8_format: str
) -> None:
    with te_cpu.gpu(capability), te_plugin(recipe=name, weights_dtype="bfloat16").forward_context():
        recipe = state().get_fp8_recipe()
    assert type(recipe) is getattr(recipes, recipe_type)
    assert recipe.fp8_format is getattr(recipes.Format, fp8_format)


def test_a_recipe_object_is_passed_through(recipes: Any) -> None:
    recipe = recipes.DelayedScaling(amax_history_len=4)
    with te_plugin(recipe=recipe).forward_context():
        assert state().get_fp8_recipe() is recipe


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        (
            "block",
            (8, 9),
            "recipe='block' needs compute capability 9.0 or higher and CUDA 12.9 or newer; "
            "this GPU has 8.9 with CUDA 13.0 and runs ['delayed', 'current']: use 'current'",
        ),
        (
            "mxfp8",
            (9, 0),
            "recipe='mxfp8' needs compute capability 10.0 up to, but not including, 12.0; "
            "this GPU has 9.0 and runs ['delayed', 'current', 'block']: use 'block'",
        ),
        (
            "mxfp8",
            (12, 0),
            "recipe='mxfp8' needs compute capability 10.0 up to, but not including, 12.0; "
            "this GPU has 12.0 and runs ['delayed', 'current', 'block', 'nvfp4']: use 'block'",
        ),
        (
            "nvfp4",
            (9, 0),
            "recipe='nvfp4' needs compute capability 10.0 or higher; "
            "this GPU has 9.0 and runs ['delayed', 'current', 'block']: use 'block'",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "transformer-engine"])
def test_a_recipe_that_the_gpu_lacks_is_refused_with_what_it_has(
    te: Any, backend: Any, name: str, capability: tuple, message: str
) -> None:
    with te_cpu.gpu(capability), pytest.raises(ValueError, match=re.escape(message)):
        Float8Precision(name, backend=backend)


def test_an_old_cuda_is_named_too(te: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    message = "this GPU has 9.0 with CUDA 12.8 and runs ['delayed', 'current']: use 'current'"
    with pytest.raises(ValueError, match=re.escape(message)):
        te_plugin(recipe="block")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    te_plugin(recipe="block")


def test_a_mapping_gives_a_recipe_its_options(recipes: Any) -> None:
    options = {"name": "delayed", "amax_history_len": 4, "fp8_format": "E4M3", "reduce_amax": False}
    with te_plugin(recipe=options).forward_context():
        recipe = state().get_fp8_recipe()
    assert type(recipe) is recipes.DelayedScaling
    assert (recipe.amax_history_len, recipe.fp8_format, recipe.reduce_amax) == (4, recipes.Format.E4M3, False)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ({"amax_history_len": 4}, ["must have a 'name'", "'delayed'"]),
        ({"name": "hybrid"}, ["'hybrid'", "'delayed'"]),
        ({"name": "delayed", "margn": 1}, ["['margn']", "'delayed'", "'margin'"]),
        ({"name": "current", "fp8_format": "E3M4"}, ["fp8_format", "'E3M4'", "'HYBRID'"]),
    ],
)
def test_options_that_a_recipe_does_not_have_are_refused(te: Any, recipe: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError, match="recipe") as raised:
        te_plugin(recipe=recipe)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("recipe", "weights_dtype", "match"),
    [
        ("nvfp4", "float32", "rotates bfloat16 values only: use weights_dtype='bfloat16'"),
        ("nvfp4", "float16", "has no float16"),
        ({"name": "nvfp4", "disable_rht": True}, "float32", None),
        ("nvfp4", "bfloat16", None),
    ],
)
def test_nvfp4_asks_for_the_weights_that_it_can_rotate(
    te: Any, on_gpu: Any, recipe: Any, weights_dtype: str, match: str | None
) -> None:
    on_gpu(te_cpu.B200)
    if match is None:
        trainer(te_plugin(recipe=recipe, weights_dtype=weights_dtype), steps=1).fit(net(), batches())
    else:
        with pytest.raises(ValueError, match=match):
            te_plugin(recipe=recipe, weights_dtype=weights_dtype)


@pytest.mark.parametrize(("capability", "backend"), [((9, 0), "transformer-engine"), ((8, 0), "torchao")])
def test_auto_takes_te_where_it_runs(te: Any, on_gpu: Any, capability: tuple, backend: str) -> None:
    on_gpu(capability)
    assert Float8Precision().backend == backend


def test_auto_takes_torchao_for_its_own_recipe(te: Any) -> None:
    assert Float8Precision("rowwise").backend == "torchao"


# The forward context


def seen_by(layer: torch.nn.Module) -> list[Any]:
    """Collects, for every call of the layer, what TE finds around it."""
    seen: list[Any] = []

    def look(*call: Any) -> None:
        manager = state()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        now = getattr(manager, "quantization_state", None)  # since 2.15
        depth = manager.AUTOCAST_DEPTH if now is None else now.autocast_depth
        seen.append((manager.is_fp8_enabled(), depth, manager.get_fp8_group(), dtype))

    layer.register_forward_pre_hook(look)
    return seen


def test_steps_run_inside_one_enabled_autocast(te: Any) -> None:
    model = net()
    seen = seen_by(model.first)
    run = trainer(te_plugin(), steps=2)
    run.fit(model, batches())
    run.test(model, batches(1), verbose=False)
    assert seen == 3 * [(True, 1, None, None)]


def test_other_operations_are_autocast_to_bfloat16_weights_only(te: Any) -> None:
    model = net()
    seen = seen_by(model.first)
    trainer(te_plugin(weights_dtype="bfloat16"), steps=1).fit(model, batches())
    assert seen == [(True, 1, None, torch.bfloat16)]
    assert model.first.weight.dtype == model.dtype == torch.bfloat16


def test_amax_is_reduced_over_the_world(te: Any, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with te_plugin().forward_context():
            assert state().get_fp8_group() is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def test_an_old_te_is_asked_through_its_old_name(recipes: Any, te: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr(te, "autocast")
    recipe = recipes.Float8CurrentScaling()
    with pytest.warns(DeprecationWarning), te_plugin(recipe=recipe).forward_context():
        assert state().is_fp8_enabled()
        assert state().get_fp8_recipe() is recipe


def test_a_run_on_another_device_is_refused(te: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(TransformerEngineBackend, "device_types", ("cuda",))
    with pytest.raises(RuntimeError, match=r"runs on cuda, and the model is on 'cpu'.*backend='torchao'"):
        trainer(te_plugin()).fit(net(), batches())


def test_an_object_that_is_no_recipe_is_refused(te: Any) -> None:
    with pytest.raises(
        TypeError, match=r"recipe must be one of .*'delayed'.*or a transformer_engine.*got 8 of type int"
    ):
        Float8Precision(8)
    with pytest.raises(ValueError, match=r"recipe='rowwise' is not offered by backend='transformer-engine', which has"):
        Float8Precision("rowwise", backend="transformer-engine")


def test_a_recipe_object_of_te_is_refused_by_torchao(recipes: Any) -> None:
    with pytest.raises(
        TypeError, match=r"recipe must be one of .* for backend='torchao', got .* of type DelayedScaling"
    ):
        Float8Precision(recipes.DelayedScaling(), backend="torchao")


# Recipes whose formats a factory chooses


@pytest.mark.parametrize(
    ("factory", "capability", "multiple"),
    [
        ("current_scaling_factory", te_cpu.H100, 16),
        ("float8_block_scaling_factory", te_cpu.H100, 128),
        ("mxfp8_factory", te_cpu.B200, 32),
        ("delayed_scaling_factory", te_cpu.H100, 16),
    ],
)
def test_a_custom_recipe_converts_what_its_formats_take(
    te: Any, on_gpu: Any, since: Any, recipes: Any, factory: str, capability: tuple, multiple: int
) -> None:
    since("2.20", "factories by role")
    on_gpu(capability)
    factories = importlib.import_module("transformer_engine.pytorch.custom_recipes.quantizer_factories")
    recipe = recipes.CustomRecipe(qfactory=getattr(factories, factory))
    plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16")
    model = nn.ModuleDict({"fits": nn.Linear(multiple, 2 * multiple), "not": nn.Linear(multiple // 2, multiple)})
    with pytest.warns(UserWarning, match=f"multiples of {multiple}: not "):
        plugin.convert_module(model)
    assert isinstance(model["fits"], te.Linear)
    inputs = torch.randn(5, multiple, dtype=torch.bfloat16, requires_grad=True)
    with plugin.forward_context():
        output = model["fits"](inputs)
    output.sum().backward()
    truth = torch.nn.functional.linear(inputs, model["fits"].weight, model["fits"].bias)
    assert 0 < (output - truth).norm() <= 0.1 * truth.norm()


def test_a_custom_recipe_with_one_format_per_direction_takes_what_both_take(te: Any, since: Any, recipes: Any) -> None:
    since("2.20", "one format per direction")
    from transformer_engine.pytorch.constants import DType

    e4m3 = DType.kFloat8E4M3

    def factory(role: Any) -> Any:
        return te.HybridQuantizer(
            rowwise_quantizer=te.Float8CurrentScalingQuantizer(e4m3, device=torch.device("cpu")),
            columnwise_quantizer=te.MXFP8Quantizer(e4m3),
        )

    assert te_plugin(recipe=recipes.CustomRecipe(qfactory=factory))._backend.multiple == 32
