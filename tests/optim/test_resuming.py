"""Loading what was saved with other options, or by another optimizer."""

import copy
import warnings
from functools import partial

import pytest
import torch
from optim.contract_cases import assert_same_params, backward, net
from torch import nn

from lightning_stosign import SignConverted, SignSGD, StatePrecision, StoSignConfig, StoSignSGD, resume_with
from lightning_stosign.optim.states.storage import read_state

NAMES = ["stosign", "signsgd", "adamw", "lion", "muon", "muon-sign", "sign-adamw", "sign-adamax", "alias"]
SHOWN = {"muon": "Muon", "sign-adamw": "SignConverted AdamW", "sign-adamax": "SignConverted Adamax", "lion": "Lion"}
SHOWN |= {"stosign": "StoSignSGD", "signsgd": "SignSGD", "adamw": "AdamW", "alias": "ALIAS", "muon-sign": "MuonSign"}


def built(name, model, precision=None, **options):
    config = StoSignConfig(name, lr=0.01, state_precision=precision, **options)
    return config.resumed(config.build_optimizer([{"params": list(model.parameters())}]))


def stepped(make, seeds=range(3)):
    model = net()
    optimizer = make(model)
    train(model, optimizer, seeds)
    return model, optimizer


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.step(partial(backward, model, seed))


@pytest.mark.parametrize("old", NAMES)
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0", "bfloat16"])
def test_another_optimizer_s_state_is_refused_by_both_names(old, precision):
    _, optimizer = stepped(partial(built, old, precision=precision))
    saved = optimizer.state_dict()
    for new in set(NAMES) - {old}:
        for other in (None, "fp8:min_numel=0"):
            with pytest.raises(ValueError, match=f"saved by .*{SHOWN[old]}.*, and .*{SHOWN[new]}.* cannot continue"):
                built(new, net(), other).load_state_dict(saved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0"])
def test_the_same_configuration_says_nothing_and_continues(name, precision):
    model, optimizer = stepped(partial(built, name, precision=precision))
    torch.optim.lr_scheduler.StepLR(optimizer, 1).step()
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    again = built(name, twin, precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(twin, again, range(3, 6))
    assert_same_params(model, twin)


def test_before_the_first_step_too():
    for old, new in [("adamw", "stosign"), ("stosign", "signsgd"), ("sign-adamw", "adamw")]:
        with pytest.raises(ValueError, match=f"saved by {SHOWN[old]}, and {SHOWN[new]}"):
            built(new, net()).load_state_dict(built(old, net()).state_dict())


CHANGES = {"lr": 0.5, "betas": (0.5, 0.75), "weight_decay": 0.25, "seed": 7, "stochastic": False}
CHANGES |= {"param_rounding": "nearest", "on_nonfinite": "skip", "maximize": True, "fused": False}


def changed(optimizer_of=StoSignSGD, **options):
    return lambda model: optimizer_of(model.parameters(), **options)


@pytest.mark.parametrize("option", CHANGES)
def test_an_overridden_option_is_named_once_with_both_values_or_kept(option):
    _, saved = stepped(changed())
    old = saved.param_groups[0][option]
    optimizer = changed(**{option: CHANGES[option]})(net())
    with pytest.warns(UserWarning) as said:
        optimizer.load_state_dict(saved.state_dict())
    assert [str(w.message).count(f"{option}={old!r} (not {CHANGES[option]!r})") for w in said] == [1]
    assert optimizer.param_groups[0][option] == old

    optimizer = changed(**{option: CHANGES[option]})(net())
    resume_with(optimizer, [option])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0][option] == CHANGES[option]


def test_all_overridden_options_are_in_one_warning():
    _, saved = stepped(changed())
    with pytest.warns(UserWarning) as said:
        changed(**CHANGES)(net()).load_state_dict(saved.state_dict())
    assert len(said) == 1 and all(f"{option}=" in str(said[0].message) for option in CHANGES)


@pytest.mark.parametrize("name", ["adamw", "lion", "sign-adamw", "muon", "signsgd"])
def test_options_of_every_optimizer_are_named_or_kept(name):
    _, saved = stepped(partial(built, name))
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 \(not 0\.5\)"):
        built(name, net(), weight_decay=0.5).load_state_dict(saved.state_dict())
    optimizer = built(name, net(), weight_decay=0.5, betas=(0.5, 0.6), keep_on_resume=("weight_decay", "betas"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved.state_dict())
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.5
    if name == "signsgd":
        assert group["momentum"] == 0.5
    else:
        assert tuple(group["betas"]) == (0.5, 0.6)


def test_a_kept_lr_stays_at_its_place_in_the_schedule():
    model, optimizer = stepped(changed(lr=0.4))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    schedule.step()
    saved = optimizer.state_dict()
    for lr in (0.8, torch.tensor(0.8)):
        again = changed(lr=lr)(model)
        torch.optim.lr_scheduler.ExponentialLR(again, 0.5)
        resume_with(again, ["lr"])
        again.load_state_dict(saved)
        assert float(again.param_groups[0]["lr"]) == pytest.approx(0.4)
        assert float(again.param_groups[0]["initial_lr"]) == pytest.approx(0.8)
        assert isinstance(again.param_groups[0]["lr"], torch.Tensor) == isinstance(lr, torch.Tensor)


def values_of(optimizer):
    states = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    return [
        read_state(optimizer.state[param], name, StatePrecision.parse(group["state_precision"] or "float32")).clone()
        for group, param in states
        for name in ("exp_avg", "exp_inf")
        if name in optimizer.state[param]
    ]


FORMATS = [None, "float32", "bfloat16", "float16", "fp8:min_numel=0", "fp8-block:min_numel=0", "fp4-block:min_numel=0"]
COARSE = {"fp8:min_numel=0": 2**-3, "fp8-block:min_numel=0": 2**-3, "fp4-block:min_numel=0": 1.0}


@pytest.mark.parametrize("make", [StoSignSGD, SignSGD])
@pytest.mark.parametrize("old", FORMATS)
@pytest.mark.parametrize("new", FORMATS)
def test_states_are_converted_to_a_kept_precision(make, old, new):
    model, optimizer = stepped(changed(make, state_precision=old))
    again = changed(make, state_precision=new)(net())
    resume_with(again, ["state_precision"])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["state_precision"] == (None if new is None else str(StatePrecision.parse(new)))
    tolerance = max(COARSE.get(new, 2**-7), 1e-7) if old != new else 0
    for before, after in zip(values_of(optimizer), values_of(again), strict=True):
        assert (before - after).abs().max() <= tolerance * before.abs().max()
    if make is StoSignSGD:
        stored = values_of(again)
        assert all((m.abs() <= g).all() for m, g in zip(stored[::2], stored[1::2], strict=True))
    train(model, again, range(3, 5))


def test_adamw_s_averages_become_a_mean_step_that_is_adamw_s():
    model, adamw = stepped(lambda model: torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9), eps=1e-30), range(5))
    optimizer = StoSignSGD(model.parameters(), lr=0.01, seed=3, state_precision="float32")
    resume_with(optimizer, convert=True)
    optimizer.load_state_dict(adamw.state_dict())
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["seed"]) == ((0.9, 1.0), 3)
    for param in model.parameters():
        of_adam, ours = adamw.state[param], optimizer.state[param]
        u = of_adam["exp_avg"] / (1 - 0.8**5) / (of_adam["exp_avg_sq"] / (1 - 0.9**5)).sqrt()
        moving = ours["exp_inf"] > 0
        torch.testing.assert_close((ours["exp_avg"] / ours["exp_inf"])[moving], u.clamp(-1, 1)[moving])
        assert int(ours["step"]) == 5
    train(model, optimizer, range(5, 8))


@pytest.mark.parametrize("old", ["adamw", "lion", "muon", "muon-sign", "signsgd", "sign-adamax", "stosign"])
@pytest.mark.parametrize("new", ["stosign", "signsgd", "muon-sign"])
@pytest.mark.parametrize("precision", [None, "fp8:min_numel=0"])
def test_averaged_gradients_are_converted_if_asked(old, new, precision):
    if old == new:
        pytest.skip("nothing to convert")
    model, optimizer = stepped(partial(built, old, precision=precision))
    again = built(new, model, precision, convert_on_resume=True)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["state_precision"] == precision
    for param in model.parameters():
        assert set(again.state[param]) >= {"exp_avg", "step"}
    before = [param.detach().clone() for param in model.parameters()]
    train(model, again, range(3, 6))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_sign_converted_continues_from_its_base_if_asked():
    model, adamw = stepped(partial(built, "adamw"))
    again = built("sign-adamw", model, convert_on_resume=True)
    again.load_state_dict(adamw.state_dict())
    for param in model.parameters():
        assert torch.equal(again.state[param]["exp_avg"], adamw.state[param]["exp_avg"])
    train(model, again, range(3, 5))


@pytest.mark.parametrize(("old", "new"), [("adamw", "alias"), ("alias", "stosign"), ("stosign", "adamw")])
def test_what_cannot_be_converted_says_so(old, new):
    _, optimizer = stepped(partial(built, old))
    with pytest.raises(ValueError, match=f"{SHOWN[old]}'s state cannot be converted to {SHOWN[new]}'s"):
        built(new, net(), convert_on_resume=True).load_state_dict(optimizer.state_dict())


def test_hooks_that_adapt_a_state_come_first():
    _, adamw = stepped(partial(built, "adamw"))
    model, ours = stepped(changed())
    adapted = ours.state_dict()
    optimizer = changed()(net())
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: adapted)
    optimizer.load_state_dict(adamw.state_dict())
    assert len(optimizer.state) == len(list(model.parameters()))


def test_unknown_options_and_fields_are_named():
    optimizer = SignConverted([nn.Parameter(torch.ones(2))], torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"keep=\['momentum'\]: no option of SignConverted; accepted: .*betas"):
        resume_with(optimizer, ["momentum"])
    with pytest.raises(ValueError, match="keep_on_resume='warmup_steps' is not supported; accepted: 'betas'"):
        StoSignConfig(keep_on_resume=("warmup_steps",))
    with pytest.raises(TypeError, match="keep_on_resume='lr' must be a list"):
        StoSignConfig(keep_on_resume="lr")


@pytest.mark.parametrize("name", NAMES)
def test_going_back_to_a_state_of_its_own_says_nothing(name):
    # As the step-size finder does between its trials.
    _, optimizer = stepped(partial(built, name))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]
