import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from float8_models import Net, ScaledMMs, Wrapped, batches, converted, net, torchao_plugin, trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_stosign.precision import Float8Precision, torchao_backend
from lightning_stosign.precision._recipes import parse_recipe
from lightning_stosign.precision.torchao_backend import _without_import_noise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.float() - truth.float()).norm() / truth.float().norm()).item()


# Arithmetic


@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_outputs_and_gradients_are_those_of_fp32_up_to_fp8_rounding(recipe: str) -> None:
    torch.manual_seed(0)
    exact = Wrapped(layer=nn.Linear(64, 48))
    rounded = converted(copy.deepcopy(exact), recipe=recipe)
    inputs = torch.randn(32, 64)
    upstream = torch.randn(32, 48)

    results = []
    for model in (exact, rounded):
        leaf = inputs.clone().requires_grad_()
        output = model.layer(leaf)
        output.backward(upstream)
        results.append((output, leaf.grad, model.layer.weight.grad, model.layer.bias.grad))

    for truth, value in zip(results[0][:3], results[1][:3], strict=True):
        assert 0.005 < relative_error(value, truth) < 0.06  # an E4M3 mantissa has 3 bits, E5M2's has 2
    torch.testing.assert_close(results[1][3], results[0][3])


def test_products_have_fp8_operands_forward_and_backward() -> None:
    model = converted(Wrapped(layer=nn.Linear(64, 48)))
    inputs = torch.randn(32, 64, requires_grad=True)
    with ScaledMMs() as products:
        model.layer(inputs).sum().backward()
    # output, input gradient, weight gradient (computed as upstream.T @ input)
    assert products.operands == [(E4M3, E4M3), (E5M2, E4M3), (E5M2, E4M3)]


@pytest.mark.parametrize(
    ("capability", "mps", "real"),
    [((9, 0), False, True), ((8, 9), False, True), ((8, 6), False, False), (None, True, False), (None, False, True)],
)
def test_products_are_emulated_only_where_the_hardware_lacks_them(
    capability: Any, mps: bool, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert torchao_backend.has_float8_gemm() is real
    assert torchao_backend.TorchAOBackend(parse_recipe("current")).config.emulate is not real
    assert torchao_backend.TorchAOBackend(parse_recipe("rowwise")).config.emulate is not (
        real and capability is not None
    )


def test_any_number_of_tokens_gives_a_gpu_inner_sizes_that_are_multiples_of_16() -> None:
    model = converted(Wrapped(layer=nn.Linear(64, 48)))
    with ScaledMMs() as products:
        model.layer(torch.randn(5, 64, requires_grad=True)).sum().backward()
    assert len(products.inner_sizes) == 3
    assert all(size % 16 == 0 for size in products.inner_sizes)


def test_the_trainer_runs_training_in_fp8() -> None:
    model = net()
    with ScaledMMs() as products:
        trainer(torchao_plugin(), steps=1).fit(model, batches(1))
    # Three layers, three products each; the first layer's input needs no gradient, but torchao computes it.
    assert products.operands.count((E4M3, E4M3)) == 3
    assert products.operands.count((E5M2, E4M3)) >= 5


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_the_loss_goes_down(recipe: str, weights_dtype: torch.dtype) -> None:
    model = net()
    trainer(torchao_plugin(recipe=recipe, weights_dtype=weights_dtype), steps=24).fit(model, batches(4))
    assert sum(model.losses[-4:]) < 0.4 * sum(model.losses[:4])


def test_a_repeated_run_is_bit_identical() -> None:
    runs = []
    for _ in range(2):
        model = net()
        trainer(torchao_plugin(), steps=4).fit(model, batches())
        runs.append(model)
    assert runs[0].losses == runs[1].losses
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(one, other)


# Types


def test_bfloat16_casts_floating_tensors_only() -> None:
    model = Wrapped(layer=nn.Linear(16, 16))
    model.register_buffer("table", torch.ones(2, dtype=torch.complex64) * 1j)
    model.register_buffer("count", torch.ones(2, dtype=torch.int64))
    converted(model, weights_dtype=torch.bfloat16)
    assert model.dtype == model.layer.weight.dtype == torch.bfloat16
    assert model.count.dtype == torch.int64
    assert torch.equal(model.table, torch.ones(2) * 1j)


def test_metric_states_keep_their_type() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    model = Wrapped(layer=nn.Linear(16, 16), metric=torchmetrics.MeanMetric())
    converted(model, weights_dtype=torch.bfloat16)
    assert model.metric.mean_value.dtype == torch.float32


def test_inputs_are_cast_to_the_type_of_the_weights() -> None:
    batch = {"x": torch.ones(2, dtype=torch.float64), "y": [torch.ones(2, dtype=torch.int64)], "name": "a"}
    result = torchao_plugin(weights_dtype="bfloat16").convert_input(batch)
    assert result["x"].dtype == torch.bfloat16
    assert result["y"][0].dtype == torch.int64
    assert result["name"] == "a"
    assert torchao_plugin().convert_input(batch)["x"].dtype == torch.float32


def test_outputs_are_cast_to_the_default_type() -> None:
    float8 = torchao_plugin(weights_dtype="bfloat16")
    outputs = float8.convert_output([torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)])
    assert [output.dtype for output in outputs] == [torch.float32, torch.int64]


@pytest.mark.parametrize("context", ["tensor_init_context", "module_init_context", "forward_context"])
def test_contexts_set_the_default_type_and_restore_the_one_they_found(context: str) -> None:
    manager = getattr(torchao_plugin(weights_dtype="bfloat16"), context)()
    torch.set_default_dtype(torch.float64)  # after the context was made: it must not restore the type of that moment
    try:
        with pytest.raises(KeyError), manager:
            assert torch.get_default_dtype() == torch.bfloat16
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("weights_dtype", "enabled"), [("float32", False), ("bfloat16", True)])
def test_only_bfloat16_weights_run_under_autocast(weights_dtype: str, enabled: bool) -> None:
    float8 = torchao_plugin(weights_dtype=weights_dtype)
    with float8.forward_context():
        assert torch.is_autocast_enabled("cpu") is enabled
        assert not enabled or torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize(("weights_dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-true")])
def test_the_model_summary_knows_the_size_of_the_weights(
    weights_dtype: str, precision: str, recwarn: pytest.WarningsRecorder
) -> None:
    run = trainer(torchao_plugin(weights_dtype=weights_dtype), steps=1, enable_model_summary=True)
    run.fit(net(), batches(1))
    assert run.precision == precision
    assert not [warning for warning in recwarn if "model summary" in str(warning.message)]


# Checkpoints


def test_state_dict_keys_are_those_of_the_unconverted_model() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    converted(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    fresh = net(seed=7)
    fresh.load_state_dict(after)
    assert torch.equal(fresh.middle.weight, before["middle.weight"])


def test_an_fp8_run_resumes_bit_for_bit(tmp_path: Any) -> None:
    # One batch an epoch: where a resumed epoch goes on is Lightning's affair.
    uninterrupted = net()
    trainer(torchao_plugin(), steps=6).fit(uninterrupted, batches(1))

    first = trainer(torchao_plugin(), steps=2)
    first.fit(net(), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = net(seed=7)
    trainer(torchao_plugin(), steps=6).fit(resumed, batches(1), ckpt_path=tmp_path / "two.ckpt", weights_only=True)

    assert resumed.losses == uninterrupted.losses[2:]
    for one, other in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("writer", ["fp8", "fp32"])
def test_checkpoints_pass_between_fp8_and_other_runs(writer: str, tmp_path: Any) -> None:
    plugins = {"fp8": torchao_plugin(), "fp32": None}
    first = trainer(plugins.pop(writer), steps=2)
    first.fit(net(), batches())
    first.save_checkpoint(tmp_path / "two.ckpt")
    (reader,) = plugins.values()
    resumed = net(seed=7)
    second = trainer(reader, steps=4)
    second.fit(resumed, batches(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert second.global_step == 4
    assert len(resumed.losses) == 2


# The Trainer and its command line


def test_the_command_line_configures_the_plugin_and_reads_its_own_config_back(tmp_path: Any) -> None:
    def run(*arguments: str) -> LightningCLI:
        args = ["--trainer.accelerator=cpu", "--trainer.logger=false", *arguments]
        return LightningCLI(Net, run=False, save_config_callback=None, args=args)

    cli = run(
        "--trainer.plugins+=Float8Precision",
        "--trainer.plugins.init_args.recipe=rowwise",
        "--trainer.plugins.init_args.backend=torchao",
        "--trainer.plugins.init_args.weights_dtype=bfloat16",
        '--trainer.plugins.init_args.exclude=["*head*"]',
    )
    (tmp_path / "config.yaml").write_text(cli.parser.dump(cli.config))
    for parsed in (cli, run(f"--config={tmp_path / 'config.yaml'}")):
        float8 = parsed.trainer.precision_plugin
        assert isinstance(float8, Float8Precision)
        assert (float8.recipe, float8.backend, float8.exclude) == ("rowwise", "torchao", ("*head*",))
        assert float8.weights_dtype == torch.bfloat16


def test_the_command_line_takes_and_dumps_the_defaults(tmp_path: Any) -> None:
    common = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(Net, run=False, save_config_callback=None, args=[*common, "--trainer.plugins+=Float8Precision"])
    (tmp_path / "config.yaml").write_text(cli.parser.dump(cli.config))
    again = LightningCLI(Net, run=False, save_config_callback=None, args=[f"--config={tmp_path / 'config.yaml'}"])
    float8 = again.trainer.precision_plugin
    assert isinstance(float8, Float8Precision)
    assert (float8.weights_dtype, float8.exclude) == (torch.float32, ())


def test_the_noise_of_importing_torchao_is_dropped_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    noise = [
        ("torchao", "Failed to load /somewhere/_C_cutlass.so: Could not load this library"),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version."),
        ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported"),
    ]
    news = [("torchao", "Your checkpoint is broken"), ("torch.utils._pytree", "something else"), ("other", noise[0][1])]

    def emit() -> list[str]:
        caplog.clear()
        for name, message in noise + news:
            logging.getLogger(name).warning(message)
        return [record.message for record in caplog.records]

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addHandler(caplog.handler)  # torch's loggers do not propagate
    try:
        with _without_import_noise():
            within = emit()
        after = emit()
    finally:
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert set(within) == {message for _, message in news}
    assert set(after) == {message for _, message in noise + news}


@pytest.mark.slow
def test_a_process_that_uses_torchao_stays_quiet() -> None:
    script = (
        'from lightning_stosign.precision import Float8Precision; Float8Precision(backend="torchao"); print("done")'
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "done\n"
    assert "Failed to load" not in result.stderr
    assert "KernelPreference" not in result.stderr


def test_fsdp2_shards_are_refused_before_conversion_and_welcome_after(tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(RuntimeError, match=r"convert_module\(self\)` before `fully_shard`"):
            converted(fully_shard(nn.Sequential(nn.Linear(16, 16)), mesh=mesh))
        model = fully_shard(converted(nn.Sequential(nn.Linear(16, 16))), mesh=mesh)
        converted(model)
        with ScaledMMs() as products:
            model(torch.randn(16, 16)).sum().backward()
        assert products.operands
        assert model[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


DDP_SCRIPT = """
import torch
from float8_models import batches, net, trainer
from torchao.float8.float8_linear import Float8Linear
from lightning_stosign.precision import Float8Precision

model = net()
run = trainer(Float8Precision(backend="torchao", exclude=["head"]), steps=3, devices=2, strategy="ddp")
run.fit(model, batches(4))
assert run.world_size == 2
assert {name for name, child in model.named_modules() if isinstance(child, Float8Linear)} == {"first", "middle", "last"}
flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
both = run.strategy.all_gather(flat)
assert torch.equal(both[0], both[1])
assert all(parameter.grad is not None for parameter in model.parameters())
print("converted", flush=True)
# Lightning leaves gloo's group to the interpreter's end, where its threads now and then abort the process.
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_converts_and_replicas_stay_identical(tmp_path: Any) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(f"import sys\nsys.path[:0] = {[str(Path(__file__).parent), str(Path.cwd())]}\n" + DDP_SCRIPT)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("converted") == 2


def test_the_scales_of_sharded_weights_are_found_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    monkeypatch.setattr(torchao_backend.TorchAOBackend, "after_step", lambda self, root: calls.append(root))
    models = [net(), net()]
    trainer(torchao_plugin(), steps=2).fit(models[0], batches())
    assert not calls
    trainer(torchao_plugin(float8_all_gather=True), steps=2).fit(models[1], batches())
    assert calls == [models[1]] * 2
    assert models[0].losses == models[1].losses  # without shards the option changes nothing


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_a_gpu_trains_with_any_sizes_and_tokens(recipe: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model = net()
    trainer(torchao_plugin(recipe=recipe, pad=True), steps=24, accelerator="gpu").fit(model, batches(4))
    assert sum(model.losses[-4:]) < 0.5 * sum(model.losses[:4])
