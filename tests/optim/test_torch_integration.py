"""The optimizers with the parts of torch that drive them: schedulers, scalers, averaging, compilation, checkpoints."""

import pytest
import torch
from contract_cases import assert_same_params, assert_same_state, backward, each_case, each_info, net, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from lightning_stosign import ALIAS

SCHEDULERS = {
    lr_scheduler.LambdaLR: lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    lr_scheduler.MultiplicativeLR: lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    lr_scheduler.StepLR: lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    lr_scheduler.MultiStepLR: lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    lr_scheduler.ConstantLR: lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 2),
    lr_scheduler.LinearLR: lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
    lr_scheduler.ExponentialLR: lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    lr_scheduler.PolynomialLR: lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 4),
    lr_scheduler.CosineAnnealingLR: lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    lr_scheduler.CyclicLR: lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 2, cycle_momentum=False),
    lr_scheduler.OneCycleLR: lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 6, cycle_momentum=False),
    lr_scheduler.ReduceLROnPlateau: lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    lr_scheduler.SequentialLR: lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
    lr_scheduler.ChainedScheduler: lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    ),
    SWALR: lambda optimizer: SWALR(optimizer, 0.001, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tried():
    known = {getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
    assert known - {lr_scheduler.LRScheduler} <= SCHEDULERS.keys()


@each_info
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=lambda make: make.__code__.co_names[-1])
def test_scheduler_drives_every_step(info, make_scheduler):
    x = nn.Parameter(torch.zeros(3, 512))
    optimizer = info.optim_cls([x], lr=0.1)
    scheduler = make_scheduler(optimizer)
    for _ in range(6):
        before, lr = x.detach().clone(), optimizer.param_groups[0]["lr"]
        x.grad = torch.ones_like(x)  # always the same: the momentum and its envelope agree, and each step is a full one
        optimizer.step()
        torch.testing.assert_close(before - x.detach(), torch.full_like(x, lr), rtol=1e-5, atol=1e-7)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@each_info
@pytest.mark.parametrize("make_scheduler", [lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR])
def test_scheduled_momentum_is_the_momentum_of_the_step(info, make_scheduler):
    x = nn.Parameter(torch.zeros(4))
    optimizer = info.optim_cls([x], lr=0.1)
    options = {
        "max_lr": 0.1,
        **({"total_steps": 8} if make_scheduler is lr_scheduler.OneCycleLR else {"base_lr": 0.01}),
    }
    scheduler = make_scheduler(optimizer, **options)
    m = torch.zeros(4)
    for step in range(5):
        group = optimizer.param_groups[0]
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        x.grad = torch.full((4,), float(step))
        m += (x.grad - m) * (1 - beta)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(optimizer.state[x]["exp_avg"], m)


@each_info
def test_averages_of_the_weights_follow_the_run(info):
    model = net()
    optimizer = info.optim_cls(model.parameters(), lr=0.01)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    mean, moving = [], None
    for seed in range(4):
        train(model, optimizer, [seed])
        swa.update_parameters(model)
        ema.update_parameters(model)
        weight = model[2].weight.detach().clone()
        mean.append(weight)
        moving = weight if moving is None else moving * 0.5 + weight * 0.5
    update_bn([torch.ones(2, 6)], swa)
    torch.testing.assert_close(swa.module[2].weight.detach(), torch.stack(mean).mean(0))
    torch.testing.assert_close(ema.module[2].weight.detach(), moving)
    plain = net()
    train(plain, info.optim_cls(plain.parameters(), lr=0.01), range(4))
    assert_same_params(model, plain)


@each_case
def test_grad_scaler_gives_the_unscaled_run_and_skips_what_overflows(build):
    model, plain = net(), net()
    optimizer, unscaled = build(model.parameters()), build(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(4):
        scaler.scale(backward_loss(model, seed)).backward()
        if seed == 2:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update(1024.0)
        optimizer.zero_grad()
        if seed != 2:
            backward(plain, seed)
            unscaled.step()
    assert_same_params(model, plain)
    assert_same_state(optimizer, unscaled)


def backward_loss(model, seed):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    return (model(x).squeeze() - x.sum(1)).square().mean()


@each_info
@pytest.mark.parametrize("fused", [False, True])
def test_compiled_step_is_the_step_and_is_traced_once(info, fused):
    if fused and "fused" not in info.supported_impls:
        pytest.skip("has no fused step")
    torch._dynamo.reset()
    options = {"fused": True} if fused else {}
    model, plain = net(), net()
    optimizer, eager = (info.optim_cls(m.parameters(), lr=0.1, **options) for m in (model, plain))
    schedulers = [lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, eager)]
    compiled = torch.compile(optimizer.step)
    for seed in range(4):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            backward(model, seed)
            compiled()
        train(plain, eager, [seed])
        for scheduler in schedulers:
            scheduler.step()
    assert_same_params(model, plain)
    assert_same_state(optimizer, eager)


@each_info
def test_compiled_step_runs_its_closure_and_hooks(info):
    model = net()
    optimizer, seen = info.optim_cls(model.parameters()), []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    loss = torch.compile(optimizer.step)(lambda: backward(model, 0))
    assert loss.item() > 0 and seen == ["post"]


@each_case
def test_distributed_checkpoint_s_state_dict_restores_by_name(build):
    model, other = net(), net()
    optimizer, loaded = build(model.parameters()), build(other.parameters())
    train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer)
    assert "2.weight" in saved["state"]
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, loaded, saved)
    assert_same_params(model, other)  # torch takes a step of length 0 to make the states
    assert_same_state(optimizer, loaded)
    train(model, optimizer, range(3, 5))
    train(other, loaded, range(3, 5))
    assert_same_params(model, other)


@each_info
def test_parameters_on_the_meta_device_are_refused_when_stepping(info):
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    optimizer = info.optim_cls(model.named_parameters())
    with pytest.raises(RuntimeError, match=r"weight \[3, 4\] is still on the meta device; materialise the model, then"):
        optimizer.step()


@each_info
def test_optimizer_of_meta_parameters_trains_once_they_are_materialised(info):
    with torch.device("meta"):
        model = net()
    optimizer = info.optim_cls(model.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)  # keeps each parameter's identity
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.load_state_dict(net().state_dict())
    train(model, optimizer, range(2))
    plain = net()
    train(plain, info.optim_cls(plain.parameters()), range(2))
    assert_same_params(model, plain)


LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "row of a larger tensor": lambda t: torch.stack([t, t])[1],
}


@each_case
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("of_grad", ["contiguous", "channels-last"])
def test_memory_format_does_not_change_the_update(build, of_param, of_grad):
    if build.func is ALIAS:
        pytest.skip("its step size is made of sums over all values, which round by the order these lie in memory")
    start = torch.randn(16, 4, 8, 2, generator=torch.Generator().manual_seed(0))
    layouts = {**LAYOUTS, "contiguous": torch.Tensor.contiguous}
    params = []
    for layout, grad_layout in ((of_param, of_grad), ("contiguous", "contiguous")):
        x = nn.Parameter(layouts[layout](start.clone()))
        optimizer = build([x])
        for seed in range(2):
            x.grad = layouts[grad_layout](torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            optimizer.step()
        params.append(x)
    assert torch.equal(*params)
    assert params[0].stride() == LAYOUTS[of_param](start).stride()


@each_case
def test_parameters_left_out_of_some_steps_keep_their_own_count(build):
    if build.func is ALIAS:
        pytest.skip("its `step` is the optimizer's step that moved the parameter last")
    a, b = nn.Parameter(torch.ones(3, 512)), nn.Parameter(torch.ones(5))
    optimizer = build([a, b])
    for used in ((a, b), (a,), (a, b)):
        optimizer.zero_grad()
        for param in used:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert (int(optimizer.state[a]["step"]), int(optimizer.state[b]["step"])) == (3, 2)
