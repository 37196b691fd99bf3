"""The Triton step on a GPU: the CPU's bits, no waiting of the host, skipped steps, GradScaler, graphs."""

import pytest
import torch

from lightning_stosign import SignSGD, StoSignSGD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]
SHAPES = [(1,), (4097,), (300, 70), (2049, 33)]
CASES = [
    {},
    {"state_precision": "bfloat16:stochastic_rounding=true"},
    {"state_precision": "fp8:min_numel=1"},
    {"state_precision": "fp8-block:min_numel=1", "betas": (0.9, 0.99)},
    {"state_precision": "fp8-raw:static_scale=1024", "stochastic": False},
    {"state_precision": "fp4-block"},
    {"cls": SignSGD, "state_precision": "fp8:min_numel=1"},
]


def make(device, dtype=torch.float32, *, cls=StoSignSGD, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]
    return params, cls(params, **{"lr": 1e-2, "weight_decay": 0.1} | options)


def set_gradients(params, step, bad=None):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * 1e-2
        param.grad = grad.to(param.device, param.dtype)
    if bad is not None:
        params[-1].grad[7, 3] = bad


def assert_same(ours, optimizer, theirs, reference):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
        for name, value in optimizer.state[a].items():
            expected = reference.state[b][name]
            assert torch.equal(value.cpu().float(), expected.cpu().float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*this step was skipped")
def test_gpu_takes_the_cpus_steps_bit_for_bit(options, dtype):
    ours, optimizer = make("cuda", dtype, on_nonfinite="skip", **options)
    theirs, reference = make("cpu", dtype, on_nonfinite="skip", fused=False, **options)
    for step in range(1, 6):
        bad = torch.inf if step == 3 else None
        set_gradients(ours, step, bad), set_gradients(theirs, step, bad)
        optimizer.step(), reference.step()
    assert_same(ours, optimizer, theirs, reference)


@pytest.mark.parametrize("states", [None, "fp8", "fp8-block"])
def test_host_does_not_wait_in_a_step(states):
    params, optimizer = make("cuda", state_precision=states)
    for step in (1, 2):
        set_gradients(params, step)
        optimizer.step()
    set_gradients(params, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensor_lr_on_the_gpu_takes_the_same_steps():
    ours, optimizer = make("cuda", lr=torch.tensor(1e-2, device="cuda"))
    theirs, reference = make("cuda", lr=1e-2)
    for step in (1, 2, 3):
        set_gradients(ours, step), set_gradients(theirs, step)
        optimizer.step(), reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_grad_scaler_skips_what_overflows():
    params, optimizer = make("cuda", fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    before = [param.detach().clone() for param in params]
    scaler.scale(params[0].sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_capture_in_a_graph_is_refused_by_name():
    params, optimizer = make("cuda")
    set_gradients(params, 1)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(graph):
        optimizer.step()
