import gc
import logging
from typing import Any

import pytest
import torch
from float8_models import Net, ScaledMMs, Wrapped, converted, linear_names, net, torchao_plugin
from torch import nn
from torchao.float8.float8_linear import Float8Linear

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


# What is converted


def test_layers_with_sizes_that_no_gpu_takes_stay_and_one_warning_names_them() -> None:
    model = Wrapped(fits=nn.Linear(32, 16), wide=nn.Linear(33, 16), odd=nn.Linear(32, 3))
    with pytest.warns(UserWarning, match="multiples of 16") as warnings:
        converted(model)
    assert linear_names(model) == {"fits"}
    assert len(warnings) == 1
    assert "wide (33 -> 16)" in str(warnings[0].message)
    assert "odd (32 -> 3)" in str(warnings[0].message)
    assert "fits" not in str(warnings[0].message)


@pytest.mark.parametrize(
    ("exclude", "names"),
    [
        ([], {"head", "blocks.0.fc", "blocks.1.fc"}),
        (["*head*"], {"blocks.0.fc", "blocks.1.fc"}),
        (["blocks.0"], {"head", "blocks.1.fc"}),
        (["*.fc"], {"head"}),
        (["blocks.?.fc", "nothing"], {"head"}),
        (["HEAD"], {"head", "blocks.0.fc", "blocks.1.fc"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Float8Precision. no module")
def test_exclude_globs_match_names_and_all_that_lies_within(exclude: list[str], names: set[str]) -> None:
    blocks = [nn.ModuleDict({"fc": nn.Linear(16, 16)}) for _ in range(2)]
    model = Wrapped(blocks=nn.Sequential(*blocks), head=nn.Linear(16, 16))
    converted(model, exclude=exclude)
    assert linear_names(model) == names


def test_a_glob_that_matches_nothing_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"no module of Wrapped matches exclude=\['heda'\]"):
        converted(Wrapped(layer=nn.Linear(16, 16), other=nn.Linear(16, 16)), exclude=["heda", "lay*"])


def test_excluded_layers_raise_no_warning_about_their_sizes(recwarn: pytest.WarningsRecorder) -> None:
    converted(Wrapped(layer=nn.Linear(16, 16), odd=nn.Linear(16, 3)), exclude=["odd"])
    assert not recwarn.list


class LoRA(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_layers_that_compute_something_else_stay() -> None:
    patched = nn.Linear(16, 16)
    patched.forward = lambda inputs: inputs
    buffered = nn.Linear(16, 16)
    buffered.register_buffer("mask", torch.ones(16))
    parent = nn.Linear(16, 16)
    parent.adapter = nn.Identity()
    scaled = nn.Linear(16, 16)
    scaled.scale = nn.Parameter(torch.ones(()))
    model = Wrapped(
        plain=nn.Linear(16, 16),
        lora=LoRA(16, 16),
        attention=nn.MultiheadAttention(16, 2),
        weight_norm=nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        old_weight_norm=nn.utils.weight_norm(nn.Linear(16, 16)),
        old_spectral_norm=nn.utils.spectral_norm(nn.Linear(16, 16)),
        patched=patched,
        buffered=buffered,
        parent=parent,
        scaled=scaled,
    )
    converted(model)
    assert linear_names(model) == {"plain"}


def test_a_second_conversion_changes_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    float8 = torchao_plugin(exclude=["head"])
    float8.convert_module(model)
    before = dict(model.named_modules())
    float8.convert_module(model)
    torchao_plugin(exclude=["head"]).convert_module(model)
    assert dict(model.named_modules()) == before
    assert not recwarn.list


def test_conversion_is_in_place_and_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    float8 = torchao_plugin()
    with caplog.at_level(logging.INFO):
        assert float8.convert_module(model) is model
        float8.convert_module(model)
    messages = [record.message for record in caplog.records if "Float8Precision" in record.message]
    assert messages == [
        "Float8Precision: 3 of 4 linear layers compute in low precision (backend 'torchao'; recipe 'current')"
    ]


# What the layers keep


def test_parameters_are_the_very_same_objects() -> None:
    model = net()
    before = dict(model.named_parameters())
    converted(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_weights_stay_tied() -> None:
    embedding, head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
    head.weight = embedding.weight
    model = converted(Wrapped(embedding=embedding, head=head))
    assert isinstance(model.head, Float8Linear)
    assert model.head.weight is model.embedding.weight


def test_a_layer_shared_under_two_names_stays_one_layer() -> None:
    shared = nn.Linear(16, 16)
    model = converted(Wrapped(one=shared, two=shared, nest=nn.Sequential(shared)))
    assert isinstance(model.one, Float8Linear)
    assert model.one is model.two is model.nest[0]


def test_a_layer_excluded_under_one_of_its_names_stays() -> None:
    shared = nn.Linear(16, 16)
    model = converted(Wrapped(one=shared, two=shared, other=nn.Linear(16, 16)), exclude=["two"])
    assert model.one is shared
    assert model.two is shared


def test_frozen_parameters_and_modes_stay() -> None:
    frozen, evaluating = nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16).eval()
    model = converted(Wrapped(frozen=frozen, evaluating=evaluating))
    assert isinstance(model.frozen, Float8Linear)
    assert not model.frozen.weight.requires_grad
    assert not model.frozen.bias.requires_grad
    assert model.frozen.training
    assert not model.evaluating.training


def test_attributes_set_by_the_user_stay() -> None:
    layer = nn.Linear(16, 16)
    layer.init_scale, layer._is_initialised = 0.5, True
    model = converted(Wrapped(layer=layer))
    assert model.layer.init_scale == 0.5
    assert model.layer._is_initialised


def test_a_compiled_call_does_not_bring_the_old_layer_back() -> None:
    layer = nn.Linear(16, 16)
    layer.compile(backend="eager")
    model = converted(Wrapped(layer=layer))
    with ScaledMMs() as products:
        model.layer(torch.randn(16, 16))
    assert len(products.operands) == 1


def test_hooks_fire_with_the_new_layer_and_their_handles_remove_them() -> None:
    layer = nn.Linear(16, 16)
    calls: list[tuple[str, nn.Module]] = []

    def note(kind: str) -> Any:
        return lambda module, *rest, **kwargs: calls.append((kind, module))

    handles = [
        layer.register_forward_pre_hook(note("forward_pre"), with_kwargs=True),
        layer.register_forward_hook(note("forward"), always_call=True),
        layer.register_full_backward_pre_hook(note("backward_pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state_dict_pre")),
        layer.register_state_dict_post_hook(note("state_dict")),
        layer.register_load_state_dict_pre_hook(note("load_pre")),
        layer.register_load_state_dict_post_hook(note("load")),
    ]
    model = converted(Wrapped(layer=layer))
    del layer
    gc.collect()

    def exercise() -> None:
        model.layer(torch.randn(16, 16, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())

    exercise()
    kinds = ["forward_pre", "forward", "backward_pre", "backward", "state_dict_pre", "state_dict", "load_pre", "load"]
    assert [kind for kind, _ in calls] == kinds
    assert all(module is model.layer for _, module in calls)

    for handle in handles:
        handle.remove()
    calls.clear()
    exercise()
    assert not calls


def test_conversion_draws_nothing_from_the_global_rng() -> None:
    model = net()
    state = torch.get_rng_state()
    converted(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_meta_device_model_stays_on_meta() -> None:
    with torch.device("meta"):
        model = Net()
    converted(model)
    assert linear_names(model) == {"first", "middle", "last"}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
