"""The checks of torch's own optimizer tests, by torch's description of an optimizer, for every optimizer here."""

import copy
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from contract_cases import assert_same_params, assert_same_state, backward, each_case, each_info, net, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytestmark = pytest.mark.filterwarnings("ignore:betas")


@each_info
def test_bad_arguments_raise_what_torch_optimizers_raise(info):
    for error_input in info.optim_error_inputs_func("cpu", torch.float32):
        case = error_input.optimizer_error_input
        params = [nn.Parameter(torch.zeros(1))] if case.params is None else case.params
        if issubclass(error_input.error_type, Warning):
            with pytest.warns(error_input.error_type, match=error_input.error_regex):
                info.optim_cls(params, **case.kwargs)
        else:
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                info.optim_cls(params, **case.kwargs)


@each_case
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.repeat(2, 1)[::2], lambda t: t.t().contiguous().t()])
def test_loss_goes_the_right_way_whatever_the_layout(build, layout):
    torch.manual_seed(0)
    weight, x = nn.Parameter(layout(torch.randn(10, 64))), torch.randn(64)
    optimizer = build([weight])
    loss = []
    for _ in range(20):
        optimizer.zero_grad()
        loss.append(weight.mv(x).square().sum())
        loss[-1].backward()
        optimizer.step()
    assert (loss[-1] > loss[0]) == optimizer.defaults.get("maximize", False)


@each_case
def test_fused_and_for_loop_steps_have_the_same_bits(build):
    def run(fused):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in [(7, 512), (512,), (3, 100), (5,), (), (0, 4)]]
        optimizer = partial(build, fused=fused)(params)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.step()
        return nn.ParameterList(params), optimizer

    if "fused" not in build.keywords:
        pytest.skip("has no fused step")
    (a, of_a), (b, of_b) = run(True), run(False)
    assert_same_params(a, b)
    assert_same_state(of_a, of_b)


@each_info
def test_param_groups_differ_in_lr_and_weight_decay(info):
    frozen_lr, decayed, plain = (nn.Parameter(torch.ones(4)) for _ in range(3))
    groups = [{"params": [frozen_lr], "lr": 0.0}, {"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}]
    optimizer = info.optim_cls(groups, lr=0.25)
    for param in (frozen_lr, decayed, plain):
        param.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(frozen_lr, torch.ones(4))
    assert torch.equal(plain - decayed, torch.full((4,), 0.125))  # lr * weight_decay * 1


@each_info
def test_options_changed_between_steps_count_from_then_on(info):
    x = nn.Parameter(torch.ones(4))
    optimizer = info.optim_cls([x], lr=0.5)
    for lr, decay, maximize in ((0.5, 0.0, False), (0.25, 0.0, True), (torch.tensor(0.125), 1.0, True)):
        optimizer.param_groups[0].update(lr=lr, weight_decay=decay, maximize=maximize)
        before = x.detach().clone()
        x.grad = torch.ones(4) * (-1 if maximize else 1)  # downhill either way
        optimizer.step()
        assert torch.equal(x.detach(), before * (1 - float(lr) * decay) - float(lr))


@each_info
@pytest.mark.parametrize("option", ["momentum", "betas"])
def test_momentum_switched_on_and_off_between_steps(info, option):
    x = nn.Parameter(torch.zeros(4))
    optimizer = info.optim_cls([x], lr=0.5)
    if option not in optimizer.defaults:
        pytest.skip("has no such option")
    for momentum in (0.0, 0.9, 0.0, 0.5):
        optimizer.param_groups[0][option] = momentum if option == "momentum" else (momentum, 1.0)
        before = x.detach().clone()
        x.grad = torch.ones(4)
        optimizer.step()
        assert torch.equal(before - x.detach(), torch.full((4,), 0.5))


@each_case
def test_zero_gradients_and_missing_ones_move_nothing(build):
    model = net()
    optimizer = build(model.parameters())
    optimizer.step()
    assert len(optimizer.state) == 0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_params(model, net())


@each_case
def test_step_changes_neither_gradients_nor_options(build):
    model = net()
    optimizer = build(model.parameters())
    train(model, optimizer, range(2))
    backward(model, 2)
    grads = [param.grad.clone() for param in model.parameters()]
    options = {name: copy.copy(value) for name, value in optimizer.param_groups[0].items()}
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), grads, strict=True))
    found = {"step_size", "estimates"}  # what ALIAS keeps for the whole optimizer
    assert all(value == options[name] for name, value in optimizer.param_groups[0].items() if name not in found)
    assert optimizer.param_groups[0].keys() == options.keys()


@each_case
def test_gradients_accumulated_over_two_batches_are_their_sum(build):
    results = []
    for together in (True, False):
        model = net()
        optimizer = build(model.parameters())
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        if together:
            (model(x).sum() + model(x).sum()).backward()
        else:
            for _ in range(2):
                model(x).sum().backward()
        optimizer.step()
        results.append(model)
    assert_same_params(*results)


@each_case
def test_state_dict_round_trip_continues_bit_for_bit_and_is_not_consumed(build, tmp_path):
    model = net()
    optimizer = build(model.named_parameters())
    train(model, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved, other = torch.load(tmp_path / "state.pt", weights_only=True), net()
    other.load_state_dict(model.state_dict())
    loaded = build(other.parameters())
    loaded.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(other, loaded, range(3, 6))
    assert_same_params(model, other)
    assert_same_state(optimizer, loaded)
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    for index, state in again["state"].items():
        for name, value in state.items():
            assert torch.equal(value.double(), saved["state"][index][name].double())


@each_info
def test_state_dict_of_equal_runs_is_equal(info):
    dicts = []
    for _ in range(2):
        model = net()
        optimizer = info.optim_cls(model.parameters())
        train(model, optimizer, range(3))
        dicts.append(optimizer.state_dict())
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    assert repr(dicts[0]["state"]) == repr(dicts[1]["state"])


@each_info
def test_state_dict_without_later_options_loads(info):
    model, other = net(), net()
    optimizer, loaded = info.optim_cls(model.parameters()), info.optim_cls(other.parameters())
    train(model, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    defaults = {flag: optimizer.defaults[flag] for flag in info.not_og_supported_flags if flag in optimizer.defaults}
    for group in state_dict["param_groups"]:
        for flag in defaults:
            del group[flag]
    loaded.load_state_dict(state_dict)
    assert {flag: loaded.param_groups[0][flag] for flag in defaults} == defaults
    other.load_state_dict(model.state_dict())
    train(model, optimizer, [2])
    train(other, loaded, [2])
    assert_same_params(model, other)


def skip_unless_it_stores_its_states(optimizer):
    if "state_precision" not in optimizer.defaults:
        pytest.skip("another optimizer's states")


@each_info
def test_step_count_saved_as_a_number_loads(info):
    model, other = net(), net()
    optimizer, loaded = info.optim_cls(model.parameters()), info.optim_cls(other.parameters())
    skip_unless_it_stores_its_states(optimizer)
    train(model, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = int(state["step"])
    loaded.load_state_dict(state_dict)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, [2])
    train(other, loaded, [2])
    assert_same_params(model, other)
    assert_same_state(optimizer, loaded)


@each_info
def test_states_load_into_parameters_of_another_dtype(info):
    model, other = net(), net(torch.float64)
    optimizer, loaded = info.optim_cls(model.parameters()), info.optim_cls(other.parameters())
    skip_unless_it_stores_its_states(optimizer)
    train(model, optimizer, range(2))
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, loaded)
    train(other, loaded, range(2, 4))
    assert all(bool(param.isfinite().all()) for param in other.parameters())


@each_info
@pytest.mark.parametrize(("source", "target"), [("named_parameters", "parameters"), ("parameters", "named_parameters")])
def test_named_and_unnamed_parameters_load_each_other_as_in_torch(info, source, target):
    names = []
    for cls in (info.optim_cls, torch.optim.AdamW):
        model, other = net(), net()
        optimizer, loaded = cls(getattr(model, source)()), cls(getattr(other, target)())
        train(model, optimizer, range(2))
        loaded.load_state_dict(optimizer.state_dict())
        assert_same_state(optimizer, loaded)
        names.append(loaded.param_groups[0].get("param_names"))
    assert names[0] == names[1]


@each_case
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_have_every_attribute_and_continue_alike(build, copier):
    model = net()
    optimizer = build(model.parameters())
    train(model, optimizer, range(2))
    other, copied = copier((model, optimizer))

    def public(optimizer):
        return {name for name in vars(optimizer) if not name.startswith("_")}

    assert public(copied) == public(optimizer)
    assert_same_state(optimizer, copied)
    train(model, optimizer, range(2, 4))
    train(other, copied, range(2, 4))
    assert_same_params(model, other)
    assert_same_state(optimizer, copied)


@each_info
def test_hooks_run_in_torch_s_order(info):
    x = nn.Parameter(torch.ones(2))
    optimizer, order = info.optim_cls([x]), []
    x.grad = torch.ones(2)

    def note(name):
        return lambda stepped, *_: order.append(name) if stepped is optimizer else None  # and not one inside it

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert order == ["global pre", "pre", "post", "global post"]


@each_info
def test_prints_its_options_as_torch_does(info):
    printed = repr(info.optim_cls([nn.Parameter(torch.ones(2))], lr=0.125))
    pattern = re.escape(info.name) + r" \(\nParameter Group 0\n(    \w+: .*\n)*    lr: 0.125\n(    \w+: .*\n)*\)"
    assert re.fullmatch(pattern, printed)


@each_info
def test_default_dtype_of_the_process_does_not_matter(info):
    results = []
    for dtype in (torch.float32, torch.float64):
        model = net()
        optimizer = info.optim_cls(model.parameters(), weight_decay=0.1)
        torch.set_default_dtype(dtype)
        try:
            for seed in range(3):
                for param in model.parameters():
                    param.grad = torch.full_like(param, float(seed) - 0.5)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((model, optimizer))
    assert_same_params(results[0][0], results[1][0])
    if "state_precision" in results[0][1].defaults:  # torch's own step counts are of the default dtype
        assert_same_state(results[0][1], results[1][1])


@each_case
def test_nothing_is_warned_of_in_an_ordinary_run(build):
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, build(model.parameters()), range(2))


@each_case
def test_autograd_notices_that_a_step_changed_what_it_saved(build):
    weight, x = nn.Parameter(torch.ones(3, 512)), torch.ones(512, requires_grad=True)
    optimizer = build([weight])
    later = weight.mv(x).sum()  # its gradient for x is made of the weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()
