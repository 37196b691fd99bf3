"""The examples that reproduce the papers' claims: each claim at a size that takes seconds."""

import json
import pickle
from pathlib import Path

import finetune_causal_lm
import momentum_distribution
import noise_intensity
import nonsmooth_convex
import nonsmooth_nonconvex
import numpy as np
import pytest
import resnet_images
import small_gpt
import sparse_noise
import torch
from jsonargparse import ArgumentParser

from lightning_stosign import StoSignConfig


def assert_figure(folder, name):
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_signsgd_never_gets_below_its_floor_for_any_step_size():
    starts = nonsmooth_convex.random_starts(50, seed=1)
    lowest = nonsmooth_convex.lowest_of_signsgd(starts, [1e-3, 0.017, 0.25, 3.0], steps=300)
    assert bool((lowest >= 1 - 1e-9).all())


def test_stosign_obeys_theorem_4_and_signsgd_does_not_converge(tmp_path, capsys):
    slopes = nonsmooth_convex.main(steps=1000, out=str(tmp_path))
    assert slopes["StoSignSGD"] < -0.4 and slopes["SignSGD"] > -0.2
    printed = capsys.readouterr().out
    share = float(printed.partition("StoSignSGD's error is at most ")[2].split()[0])
    assert share < 1
    assert_figure(tmp_path, "nonsmooth_convex")


def test_subgradient_is_one():
    x = nonsmooth_convex.random_starts(200).requires_grad_()
    (expected,) = torch.autograd.grad(nonsmooth_convex.f(x).sum(), x)
    assert torch.equal(nonsmooth_convex.subgradient(x.detach()), expected)


def test_counted_steps_are_the_first_whose_last_half_is_below_the_target():
    norms = np.random.default_rng(0).uniform(0, 0.2, (50, 6)) * np.linspace(2, 0.5, 50)[:, None]
    needed = sparse_noise.steps_needed(norms)
    for column, steps in zip(norms.T, needed, strict=True):
        below = [t for t in range(1, 51) if column[t // 2 : t].mean() <= sparse_noise.TARGET]
        assert steps == (below[0] if below else np.inf)


def test_recursion_of_sgd_is_sgd():
    dim, lr, seeds = 10, 0.02, 2
    noise = torch.from_numpy(np.random.default_rng(dim).standard_normal((400 * dim - 1, seeds)))
    h = torch.full((dim,), 1 / dim, dtype=torch.float64)
    h[0] = 1.0
    x = torch.nn.Parameter(torch.ones(seeds, dim, dtype=torch.float64))
    x.data[:, 0] = 0.0
    optimizer = torch.optim.SGD([x], lr=lr)
    norms = []
    for row in noise:
        x.grad = x.detach() * h
        norms.append(x.grad.abs().sum(dim=1))
        x.grad[:, 0] += row
        optimizer.step()
    expected = float(np.median(sparse_noise.steps_needed(torch.stack(norms).numpy())))
    assert sparse_noise.sgd_steps(dim, np.array([lr]), seeds) == (expected, lr)


@pytest.mark.slow
def test_sgd_needs_steps_in_proportion_to_the_dimension_and_signsgd_does_not(tmp_path):
    slopes = sparse_noise.main(dims=(10, 100), muon_up_to=10, seeds=2, out=str(tmp_path))
    assert slopes["SGD"] == pytest.approx(1.0, abs=0.15)
    # Two seeds at two dimensions, on a grid of step sizes: the full run's slope over 10 to 3,000 is within 0.1 of 0.
    assert slopes["SignSGD"] == pytest.approx(0.0, abs=0.3)
    assert_figure(tmp_path, "sparse_noise")


def test_stationarity_falls_with_the_budget(tmp_path):
    assert nonsmooth_nonconvex.main(budgets=(100, 1000), seeds=1, out=str(tmp_path)) < -0.1
    assert_figure(tmp_path, "nonsmooth_nonconvex")


@pytest.mark.slow
def test_noise_intensity_is_measured_for_each_kind_of_parameter(tmp_path):
    measured = noise_intensity.main(steps=24, out=str(tmp_path))
    for kinds in measured.values():
        assert set(kinds) == {"attention", "embedding", "MLP", "norm"}
        for values in kinds.values():
            rms_of_noise, mean, rms = values[-1]
            assert rms_of_noise**2 + rms**2 == pytest.approx(1, abs=0.05)
            assert 1 - rms <= mean <= 1  # mean |u| <= RMS u
    assert_figure(tmp_path, "noise_intensity")


@pytest.mark.slow
def test_fp8_loses_more_of_the_second_moment_than_of_the_envelope(tmp_path):
    lost = momentum_distribution.main(steps=24, out=str(tmp_path))
    assert lost["AdamW"]["exp_avg_sq"] > 10 * lost["StoSignSGD"]["exp_inf"]
    assert_figure(tmp_path, "momentum_distribution")


def test_share_lost_is_what_the_cast_loses():
    value = torch.logspace(-8, 2, 5000)
    lost = ((value * 1024**2).clamp(max=448).to(torch.float8_e4m3fn).float() == 0).sum()
    share = momentum_distribution.share_lost("exp_avg_sq", [value], "fp8-raw:static_scale=1024")
    assert share == pytest.approx(int(lost) / 5000)


def test_every_parameter_of_the_gpt_is_of_a_kind():
    names = [name for name, _ in small_gpt.GPTModule(size="1m").named_parameters()]
    assert {small_gpt.kind_of(name) for name in names} == {"attention", "embedding", "MLP", "norm"}
    assert [n for n in names if small_gpt.kind_of(n) == "embedding"] == [
        "model.tokens.weight",
        "model.positions.weight",
    ]


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": rng.integers(0, 256, (7, 3072), dtype=np.uint8), b"labels": rng.integers(0, 10, 7).tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    return tmp_path


def test_cifar10_is_read_in_order_and_standardised(cifar):
    images = resnet_images.read_cifar10(cifar)
    train, classes = images.train.tensors
    assert train.shape == (35, 3, 32, 32) and len(images.test) == 7
    torch.testing.assert_close(train.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    last = pickle.loads((cifar / "data_batch_5").read_bytes())
    assert classes[-7:].tolist() == last[b"labels"]
    pixels, shown = torch.from_numpy(last[b"data"][-1]).view(3, 32, 32).float(), train[-1]
    assert torch.corrcoef(torch.stack([pixels[1].flatten(), shown[1].flatten()]))[0, 1] > 0.999
    assert resnet_images.ResNet18(3, 2, StoSignConfig()).net(train[:2]).shape == (2, 10)


def test_missing_cifar10_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data_batch_1 in it"):
        resnet_images.read_cifar10(tmp_path)


def test_resnet18_has_its_parameters():
    net = resnet_images.ResNet18(3, 64, StoSignConfig()).net
    assert sum(p.numel() for p in net.parameters()) == 11_173_962


@pytest.mark.slow
def test_resnet_learns_digits(tmp_path):
    accuracies = resnet_images.main(width=4, epochs=3, out=str(tmp_path))
    assert len(accuracies) == 4 and max(accuracies.values()) > 0.5
    assert_figure(tmp_path, "resnet_images")


def test_loss_is_that_of_the_response_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"instruction": "Hi", "response": "Yo"}) + "\n")
    ((tokens, labels),) = finetune_causal_lm.read_examples(str(path), finetune_causal_lm.Bytes(), 100)
    assert bytes(tokens[:-1]).decode() == "### Instruction:\nHi\n### Response:\nYo" and tokens[-1] == 256
    assert [t for t in labels if t != finetune_causal_lm.IGNORED] == [*b"Yo", 256] == tokens[-3:]
    batch = finetune_causal_lm.collate([(tokens, labels), (tokens[:4], labels[:4])])
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(tokens), 4]
    assert batch["labels"][1].unique().tolist() == [finetune_causal_lm.IGNORED]


def test_bad_line_of_the_data_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "Hi", "response": "Yo"}\n{"prompt": "Hi"}\n')
    with pytest.raises(ValueError, match="line 2: must have the keys 'instruction' and 'response'"):
        finetune_causal_lm.read_examples(str(path), finetune_causal_lm.Bytes(), 100)


def test_configuration_for_7b_is_valid():
    parser = ArgumentParser()
    parser.add_function_arguments(finetune_causal_lm.main)
    config = parser.instantiate(parser.parse_path(Path(finetune_causal_lm.__file__).with_name("finetune_7b.yaml")))
    assert config.configs["StoSignSGD"].state_precision == "fp8" and config.precision == "bf16-true"


@pytest.mark.slow
def test_finetuning_learns_and_reads_a_local_model(tmp_path):
    losses = finetune_causal_lm.main(epochs=2, out=str(tmp_path))
    assert losses["StoSignSGD"] < 3.0 and losses["AdamW"] < 3.0  # a uniform guess is 5.5
    assert_figure(tmp_path, "finetune_causal_lm")
