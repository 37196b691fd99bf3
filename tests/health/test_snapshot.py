import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_optimizers import stepped

from lightning_stosign import StoSignSGD
from lightning_stosign.health import Moments, read_moments
from lightning_stosign.health.snapshot import Snapshot, parameters_of

NAN, INF = float("nan"), float("inf")


def moments(states, numerator=None, denominator=None, stochastic_sign=False):
    states = {name: torch.tensor(value) for name, value in states.items()}
    return Moments(
        states=states,
        numerator=states.get(numerator),
        denominator=states.get(denominator),
        decisive_names=frozenset(states),
        decoupled_weight_decay=0.0,
        stochastic_sign=stochastic_sign,
    )


def scalars(layers, per_layer=False, **options):
    snapshot = Snapshot(**options)
    for name, layer in layers.items():
        snapshot.add_states(name, layer)
    return snapshot.records(per_layer)[0]


A, B = [3.0, 0.0, -4.0, 0.0], [[1.0], [0.0]]


def test_global_zero_fraction_weighs_entries_not_layers():
    assert scalars({"a": moments({"m": A}), "b": moments({"m": B})})["zero_fraction/m"] == 3 / 6


def test_global_rms_is_over_all_entries():
    found = scalars({"a": moments({"m": A}), "b": moments({"m": B})})["rms/m"]
    assert found == pytest.approx(math.sqrt(26 / 6))


def test_global_abs_max_is_the_largest_layer_s():
    assert scalars({"a": moments({"m": A}), "b": moments({"m": B})})["abs_max/m"] == 4.0


def test_rms_of_tiny_second_moments_is_right():
    assert scalars({"a": moments({"v": [1e-30] * 8})})["rms/v"] == pytest.approx(1e-30, rel=1e-6)


def test_layers_are_recorded_each_under_its_name():
    found = scalars({"a": moments({"m": A}), "b": moments({"m": B})}, per_layer=True)
    assert (found["zero_fraction/m/a"], found["zero_fraction/m/b"]) == (1 / 2, 1 / 2)
    assert (found["abs_max/m/a"], found["abs_max/m/b"]) == (4.0, 1.0)
    assert (found["rms/m/a"], found["rms/m/b"]) == (pytest.approx(2.5), pytest.approx(math.sqrt(0.5)))


def test_without_per_layer_there_are_only_global_tags():
    assert scalars({"a": moments({"m": A})}).keys() == {"zero_fraction/m", "abs_max/m", "rms/m"}


def test_layers_without_a_state_do_not_count_in_it():
    assert scalars({"a": moments({"m": A}), "b": moments({"v": B})})["zero_fraction/m"] == 2 / 4


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("tag", ["abs_max/m", "rms/m"])
def test_a_nan_in_any_layer_is_not_hidden(order, tag):
    layers = [moments({"m": [NAN]}), moments({"m": [1.0]}), moments({"m": [5.0]})]
    assert math.isnan(scalars({str(i): layers[i] for i in order})[tag])


def test_an_infinite_state_has_infinite_rms():
    assert scalars({"a": moments({"m": [INF, 1.0]})})["rms/m"] == INF


def test_underflow_fraction_is_of_the_nonzero_entries_of_all_layers():
    # E4M3 without a scale stores magnitudes up to 2**-10 as 0.
    found = scalars(
        {"a": moments({"m": [1.0, 1e-4, 0.0]}), "b": moments({"m": [1e-5]})},
        per_layer=True,
        forecast=["fp8-raw:min_numel=0"],
    )
    assert found["underflow_fraction/m/fp8-raw:min_numel=0"] == pytest.approx(2 / 3)
    assert found["underflow_fraction/m/fp8-raw:min_numel=0/b"] == 1.0


def test_underflow_fraction_of_an_all_zero_state_is_0():
    assert scalars({"a": moments({"m": [0.0]})}, forecast=["fp8"])["underflow_fraction/m/fp8"] == 0.0


def test_forecast_of_a_second_moment_uses_the_static_scale_squared():
    # 2**-26 times 1024**2 is 2**-6, which E4M3 has; times 1024 it would be 2**-16.
    spec = "fp8-raw:static_scale=1024,min_numel=0"
    found = scalars({"a": moments({"exp_avg": [2.0**-26], "exp_avg_sq": [2.0**-26]})}, forecast=[spec])
    assert found[f"underflow_fraction/exp_avg/{spec}"] == 1.0
    assert found[f"underflow_fraction/exp_avg_sq/{spec}"] == 0.0


def test_dead_and_exploding_fractions_are_over_all_coordinates():
    found = scalars(
        {
            "a": moments({"m": [0.0, 1.0, 1.0, 0.0], "v": [0.0, 0.0, 1.0, 1.0]}, "m", "v"),
            "b": moments({"m": [1.0], "v": [1.0]}, "m", "v"),
        }
    )
    assert (found["dead_fraction"], found["exploding_fraction"]) == (1 / 5, 1 / 5)


def test_without_a_denominator_nothing_is_dead_or_exploding():
    found = scalars({"a": moments({"m": [0.0]}, "m")})
    assert not {"dead_fraction", "exploding_fraction"} & found.keys()


def test_noise_is_over_the_coordinates_that_move():
    found = scalars(
        {
            "a": moments({"m": [0.5, 0.0, 0.0], "G": [1.0, 0.0, 2.0]}, "m", "G", stochastic_sign=True),
            "b": moments({"m": [-1.0], "G": [1.0]}, "m", "G", stochastic_sign=True),
        },
        per_layer=True,
    )
    assert found["noise_rms"] == pytest.approx(math.sqrt((0.75 + 1 + 0) / 3))
    assert found["sign_agreement"] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert found["noise_rms/b"] == 0.0


def test_noise_is_for_stochastic_signs_only():
    found = scalars({"a": moments({"m": [0.5], "v": [1.0]}, "m", "v")})
    assert not {"noise_rms", "sign_agreement"} & found.keys()


def test_gradients_largest_magnitude_and_its_square_are_over_all_layers():
    snapshot = Snapshot()
    snapshot.add_gradient("a", torch.tensor([1.0, -3.0]))
    snapshot.add_gradient("b", torch.tensor([2.0], dtype=torch.bfloat16))
    found, _ = snapshot.records(per_layer=True)
    assert found == {
        "grad_abs_max": 3.0,
        "grad_abs_max/a": 3.0,
        "grad_abs_max/b": 2.0,
        "grad_square_max": 9.0,
        "grad_square_max/a": 9.0,
        "grad_square_max/b": 4.0,
    }


def test_the_square_of_a_tiny_gradient_does_not_underflow():
    snapshot = Snapshot()
    snapshot.add_gradient("a", torch.tensor([1e-30]))
    assert snapshot.records(False)[0]["grad_square_max"] == pytest.approx(1e-60)


def test_sparse_gradients_count_repeated_entries_summed():
    snapshot = Snapshot()
    snapshot.add_gradient("a", torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (4,), check_invariants=True))
    assert snapshot.records(False)[0]["grad_abs_max"] == 5.0


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5), torch.tensor([0.5])])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_update_rms_is_of_the_step_over_lr_without_its_decay(lr, shape):
    before = torch.tensor([1.0, -2.0, 0.5, 4.0]).view(shape)
    direction = torch.tensor([1.0, -1.0, 3.0, 0.0]).view(shape)
    after = before - 0.5 * direction - 0.5 * 0.25 * before
    snapshot = Snapshot()
    snapshot.add_update("a", before, after, lr, 0.25)
    assert snapshot.records(False)[0]["update_rms"] == pytest.approx(math.sqrt(11 / 4), rel=1e-6)


def test_update_rms_takes_a_one_element_lr_for_a_scalar_parameter():
    snapshot = Snapshot()
    snapshot.add_update("a", torch.tensor(1.0), torch.tensor(0.0), torch.tensor([0.5]), 0.0)
    assert snapshot.records(False)[0]["update_rms"] == 2.0


def test_update_rms_leaves_the_parameters_alone():
    before, after = torch.tensor([1.0]), torch.tensor([2.0])
    Snapshot().add_update("a", before, after, 0.1, 0.1)
    assert (before.item(), after.item()) == (1.0, 2.0)


def test_update_rms_of_half_precision_parameters_is_computed_in_float32():
    before, after = (torch.tensor(x, dtype=torch.bfloat16) for x in ([256.0, 1.0], [255.0, 1.0]))
    snapshot = Snapshot()
    snapshot.add_update("a", before, after, 1.0, 2.0**-9)  # 2**-9 - 0 is exact in float32 only
    assert snapshot.records(False)[0]["update_rms"] == pytest.approx(math.sqrt((0.25 + 2.0**-18) / 2))


def test_a_step_that_moves_nothing_was_skipped_with_its_decay():
    snapshot = Snapshot()
    snapshot.add_update("a", torch.ones(3), torch.ones(3), 0.1, 0.1)
    assert snapshot.records(False)[0]["update_rms"] == 0.0


def test_a_loss_scale_is_taken_out_of_the_gradient():
    snapshot = Snapshot()
    snapshot.add_gradient("a", torch.tensor([6.0]), torch.tensor(4.0))
    found, _ = snapshot.records(False)
    assert found == {"grad_abs_max": 1.5, "grad_square_max": 2.25}


STALLING = "fp8-raw:min_numel=0"


def test_stalled_fraction_is_of_all_coordinates_that_should_change():
    # Of 1.0, 1.125 is E4M3's next number.
    layers = {
        "a": replace(moments({"m": [1.0, 1.0, 1.0]}), changes={"m": lambda part: torch.tensor([0.01, 0.1, 0.0])[part]}),
        "b": replace(moments({"m": [1.0]}), changes={"m": lambda part: torch.tensor([0.05])[part]}),
        "c": moments({"m": [1.0]}),
    }
    found = scalars(layers, per_layer=True, forecast=[STALLING])
    assert found[f"stalled_fraction/m/{STALLING}"] == pytest.approx(2 / 3)
    assert found[f"stalled_fraction/m/{STALLING}/a"] == 1 / 2
    assert f"stalled_fraction/m/{STALLING}/c" not in found


def test_quantiles_are_over_the_nonzero_magnitudes_of_all_layers():
    found = scalars(
        {"a": moments({"m": [1.0, 0.0, 2.0]}), "b": moments({"m": [8.0]})}, per_layer=True, quantiles=[0.5, 1.0]
    )
    assert found["log10_quantile/m/0.5"] == pytest.approx(math.log10(2))
    assert found["log10_quantile/m/1"] == pytest.approx(math.log10(8))
    assert found["log10_quantile/m/0.5/a"] == 0.0


@pytest.mark.parametrize(("depth", "labels"), [(1, {"net"}), (2, {"net.a", "net.b"}), (9, {"net.a.w", "net.b.w"})])
def test_layers_are_taken_together_by_depth(depth, labels):
    snapshot = Snapshot(histograms=True, quantiles=[1.0])
    snapshot.add_states("net.a.w", moments({"m": A}))
    snapshot.add_states("net.b.w", moments({"m": B}))
    found, histograms = snapshot.records(per_layer=True, depth=depth)
    assert {tag.split("/")[2] for tag in found if tag.startswith("zero_fraction/m/")} == labels
    assert {tag.split("/")[2] for tag in histograms if tag.startswith("log10_abs/m/")} == labels
    assert {tag.split("/")[3] for tag in found if tag.startswith("log10_quantile/m/1/")} == labels


def test_a_module_s_record_is_over_the_entries_of_its_layers():
    snapshot = Snapshot(histograms=True, quantiles=[1.0])
    for name, values in (("net.a.w", A), ("net.a.b", B), ("net.c", [100.0])):
        snapshot.add_states(name, moments({"m": values}))
    found, histograms = snapshot.records(per_layer=True, depth=2)
    assert found["zero_fraction/m/net.a"] == 3 / 6
    assert found["rms/m/net.a"] == pytest.approx(math.sqrt(26 / 6))
    assert found["abs_max/m/net.a"] == 4.0
    assert found["log10_quantile/m/1/net.a"] == pytest.approx(math.log10(4))
    assert sum(histograms["log10_abs/m/net.a"]) == 3


def test_with_lr_0_there_is_no_update_rms():
    snapshot = Snapshot()
    snapshot.add_update("a", torch.ones(1), torch.ones(1), 0.0, 0.1)
    assert snapshot.records(False)[0] == {}


def test_global_histogram_is_the_sum_of_the_layers():
    snapshot = Snapshot(histograms=True)
    snapshot.add_states("a", moments({"m": [1.1, 0.0, 1e-3]}))
    snapshot.add_states("b", moments({"m": [1.2]}))
    _, histograms = snapshot.records(per_layer=True)
    np.testing.assert_array_equal(
        histograms["log10_abs/m"], np.add(histograms["log10_abs/m/a"], histograms["log10_abs/m/b"])
    )
    assert (sum(histograms["log10_abs/m/a"]), sum(histograms["log10_abs/m/b"])) == (2, 1)


def test_histograms_only_on_request():
    snapshot = Snapshot(histograms=False)
    snapshot.add_states("a", moments({"m": [1.0]}))
    assert snapshot.records(True)[1] == {}


def test_empty_tensors_are_passed_over():
    snapshot = Snapshot(forecast=["fp8"], histograms=True)
    snapshot.add_gradient("a", torch.zeros(0))
    snapshot.add_states("a", moments({"m": [], "v": []}, "m", "v"))
    assert snapshot.records(True) == ({}, {})


class HostReads(TorchDispatchMode):
    """Counts what brings one number to the host: item(), bool(), float()."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def transfers(monkeypatch):
    calls = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: calls.append(self.numel()) or cpu(self))
    return calls


def test_a_record_is_one_host_transfer(transfers):
    optimizer, param = stepped(partial(StoSignSGD, state_precision="fp8:min_numel=0"))
    group = optimizer.param_groups[0]
    with HostReads() as reads:
        snapshot = Snapshot(forecast=("fp8", "fp8-block", "fp8-raw:static_scale=1024"), histograms=True)
        for layer in ("a", "b", "c"):
            snapshot.add_gradient(layer, param.grad)
            snapshot.add_states(layer, read_moments(optimizer, param, group))
            snapshot.add_update(layer, param.detach(), param.detach(), 0.1, 0.1)
        snapshot.records(per_layer=True)
    assert (len(transfers), reads.count) == (1, 0)


def test_parameters_come_with_their_groups():
    a, b, c = (nn.Parameter(torch.zeros(n)) for n in (4, 2, 0))
    optimizer = torch.optim.AdamW([{"params": [a, c]}, {"params": [b]}])
    groups = optimizer.param_groups
    found = [(id(param), id(group)) for param, group in parameters_of(optimizer)]
    assert found == [(id(a), id(groups[0])), (id(c), id(groups[0])), (id(b), id(groups[1]))]


@pytest.mark.parametrize("size", [4, 40_000])  # stacked with others, and in parts
@pytest.mark.parametrize("direction", [None, "numerator"])
def test_steps_below_half_the_spacing_of_bfloat16_are_lost(size, direction):
    before = torch.tensor([1.0, 1.0, 256.0, 0.0], dtype=torch.bfloat16).repeat(size // 4)
    intended = torch.tensor([2.0**-10, 2.0**-7, 0.9, 0.0]).repeat(size // 4)
    after = (before.float() + intended).to(torch.bfloat16)
    moves = None if direction is None else intended
    snapshot = Snapshot(updates=["lost_update_fraction"])
    snapshot.add_step("a", before, after, -intended, moves)
    snapshot.add_step("b", before, before, -intended, moves)
    found, _ = snapshot.records(per_layer=True)
    assert found["lost_update_fraction/a"] == pytest.approx(2 / 3)  # the fourth should not move
    assert found["lost_update_fraction/b"] == 1.0
    assert found["lost_update_fraction"] == pytest.approx(5 / 6)


def test_parameters_that_are_nan_are_not_hidden():
    snapshot = Snapshot(updates=["update_to_weight"])
    snapshot.add_step("a", torch.tensor([math.nan]), torch.tensor([1.0]), torch.ones(1), None)
    assert math.isnan(snapshot.records(False)[0]["update_to_weight"])
