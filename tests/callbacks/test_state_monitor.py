import numpy as np
import pytest
import torch
from fits import Regression, Step, fit, histograms, scalars

from lightning_stosign import OptimizerStateMonitor
from lightning_stosign.health import log10_bin_edges
from lightning_stosign.health.steps import UPDATE_STATISTICS

LAYERS = ["first.weight", "first.bias", "head.weight", "head.bias"]


def state_tags(*states, forecast=("fp8", "fp8-raw")):
    tags = {f"{kind}/{state}" for kind in ("zero_fraction", "abs_max", "rms") for state in states}
    tags |= {f"log10_quantile/{state}/{quantile}" for state in states for quantile in (0.05, 0.5, 0.95)}
    kinds = ("underflow_fraction", "stalled_fraction")
    return tags | {f"{kind}/{state}/{name}" for kind in kinds for state in states for name in forecast}


ALWAYS = {"update_rms", "grad_abs_max", "grad_square_max", *UPDATE_STATISTICS}
QUOTIENT = {"dead_fraction", "exploding_fraction"}
NOISE = {"noise_rms", "sign_agreement"}
TAGS = {
    "stosign": ALWAYS | QUOTIENT | NOISE | state_tags("exp_avg", "exp_inf"),
    "stosign-fp8": ALWAYS | QUOTIENT | NOISE | state_tags("exp_avg", "exp_inf"),
    "in-expectation": ALWAYS | QUOTIENT | state_tags("exp_avg", "exp_inf"),
    "signsgd": ALWAYS | state_tags("exp_avg"),
    "adamw": ALWAYS | QUOTIENT | state_tags("exp_avg", "exp_avg_sq"),
    "sgd": ALWAYS | state_tags("momentum_buffer"),
    "plain-sgd": ALWAYS,
}


def with_prefix(tags):
    return {f"optimizer_state/{tag}" for tag in tags}


def of_layers(tags):
    return {f"per_layer_{tag}/{layer}" for tag in tags for layer in LAYERS}


def logged(folder):
    return {tag for tag in scalars(folder) if tag.startswith(("optimizer_state/", "per_layer_"))}


@pytest.mark.parametrize("optimizer", TAGS)
def test_tags_are_those_of_the_table_global_and_per_layer(tmp_path, optimizer):
    fit(Regression(optimizer), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    assert logged(tmp_path) == with_prefix(TAGS[optimizer]) | of_layers(TAGS[optimizer])


def test_the_old_names_of_layers_are_behind_a_flag_that_warns(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"OptimizerStateMonitor\(old_tags=True\) is deprecated"):
        monitor = OptimizerStateMonitor(old_tags=True)
    fit(Regression("sgd"), tmp_path, max_steps=1, callbacks=[monitor])
    assert logged(tmp_path) == with_prefix(TAGS["sgd"] | {f"{tag}/{layer}" for tag in TAGS["sgd"] for layer in LAYERS})


def test_without_per_layer_only_the_global_tags_are_logged(tmp_path):
    fit(Regression("adamw"), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(per_layer=False)])
    assert logged(tmp_path) == with_prefix(TAGS["adamw"])
    assert set(histograms(tmp_path)) == with_prefix({"log10_abs/exp_avg", "log10_abs/exp_avg_sq"})


def test_forecast_names_the_formats(tmp_path):
    monitor = OptimizerStateMonitor(per_layer=False, histograms=False, forecast=["float16"])
    fit(Regression("signsgd"), tmp_path, max_steps=1, callbacks=[monitor])
    found = {tag for tag in scalars(tmp_path) if "underflow" in tag}
    assert found == {"optimizer_state/underflow_fraction/exp_avg/float16"}


@pytest.mark.parametrize("optimizer", ["lbfgs", "adafactor"])
def test_other_optimizers_of_torch_are_monitored(tmp_path, optimizer):
    fit(Regression(optimizer), tmp_path, max_steps=2, callbacks=[OptimizerStateMonitor()])
    assert with_prefix(ALWAYS) <= scalars(tmp_path).keys()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Fits with clipping on, once for each optimizer: the values around step 2, and what was logged for it."""
    made = {}

    def run(optimizer):
        if optimizer not in made:
            folder, step = tmp_path_factory.mktemp(optimizer), Step(2)
            monitor = OptimizerStateMonitor(forecast=["fp8-raw:min_numel=0"])
            fit(Regression(optimizer), folder, callbacks=[monitor, step], gradient_clip_val=0.05)
            made[optimizer] = (step, {tag: by_step[2] for tag, by_step in scalars(folder).items()}, histograms(folder))
        return made[optimizer]

    return run


def test_gradient_clipping_was_on_in_these_tests(recorded):
    step, _, _ = recorded("adamw")
    assert np.linalg.norm(step.clipped["first.weight"]) < 0.5 * np.linalg.norm(step.grads["first.weight"])


@pytest.mark.parametrize("optimizer", ["stosign", "adamw", "plain-sgd"])
def test_gradient_records_are_before_clipping(recorded, optimizer):
    step, found, _ = recorded(optimizer)
    largest = {name: np.abs(grad).max() for name, grad in step.grads.items()}
    assert found["optimizer_state/grad_abs_max"] == pytest.approx(max(largest.values()), rel=1e-6)
    assert found["optimizer_state/grad_square_max"] == pytest.approx(max(largest.values()) ** 2, rel=1e-6)
    assert found["per_layer_grad_abs_max/head.weight"] == pytest.approx(largest["head.weight"], rel=1e-6)


def test_every_step_of_stosign_has_length_1_despite_decay_and_clipping(recorded):
    _, found, _ = recorded("stosign")
    # The weights of the input that is always 0 are dead: 8 of the 24.
    assert found["per_layer_update_rms/head.weight"] == pytest.approx(1.0, abs=1e-5)
    assert found["per_layer_update_rms/first.weight"] == pytest.approx(np.sqrt(16 / 24), abs=1e-5)
    assert found["optimizer_state/update_rms"] == pytest.approx(np.sqrt(33 / 41), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "in-expectation", "signsgd"])
def test_update_rms_is_of_the_step_taken_without_decay(recorded, optimizer):
    step, found, _ = recorded(optimizer)
    lr, decay = 0.01, {"adamw": 0.01}.get(optimizer, 0.0)
    direction = np.concatenate(
        [((step.after[n] - step.before[n] + lr * decay * step.before[n]) / lr).reshape(-1) for n in LAYERS]
    )
    assert found["optimizer_state/update_rms"] == pytest.approx(np.sqrt(np.mean(direction**2)), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["stosign", "adamw", "sgd", "plain-sgd"])
def test_updates_are_those_of_float64_globally_and_per_layer(recorded, optimizer):
    step, found, _ = recorded(optimizer)
    for prefix, end, layers in [("optimizer_state/", "", LAYERS)] + [("per_layer_", f"/{n}", [n]) for n in LAYERS]:
        before, after, raw, grad = (
            np.concatenate([values[n].reshape(-1) for n in layers])
            for values in (step.before, step.after, step.grads, step.clipped)
        )
        moved = after - before
        expected = {
            "parameter_rms": np.sqrt(np.mean(after**2)),
            "grad_rms": np.sqrt(np.mean(raw**2)),
            "update_to_weight": np.linalg.norm(moved) / np.linalg.norm(before),
            "update_grad_cosine": -moved @ grad / np.linalg.norm(moved) / np.linalg.norm(grad),
            "lost_update_fraction": 0.0,
        }
        for name, value in expected.items():
            assert found[f"{prefix}{name}{end}"] == pytest.approx(value, rel=1e-5), name


def test_updates_are_off_where_none_is_named(tmp_path):
    fit(Regression("sgd"), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(updates=["grad_rms"])])
    off = set(UPDATE_STATISTICS) - {"grad_rms"}
    assert logged(tmp_path) == with_prefix(TAGS["sgd"] - off) | of_layers(TAGS["sgd"] - off)


def test_an_unknown_update_is_refused():
    with pytest.raises(ValueError, match="'update_norm' is unknown; accepted: 'update_to_weight'"):
        OptimizerStateMonitor(updates=["update_norm"])


@pytest.mark.parametrize(
    ("optimizer", "state"), [("stosign", "exp_inf"), ("adamw", "exp_avg_sq"), ("sgd", "momentum_buffer")]
)
def test_state_records_are_of_the_state_after_the_update(recorded, optimizer, state):
    step, found, _ = recorded(optimizer)
    values = step.flat(state)
    assert found[f"optimizer_state/zero_fraction/{state}"] == pytest.approx(np.mean(values == 0), rel=1e-6)
    assert found[f"optimizer_state/abs_max/{state}"] == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert found[f"optimizer_state/rms/{state}"] == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-6)
    assert found[f"per_layer_zero_fraction/{state}/first.weight"] == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "state"), [("stosign", "exp_avg"), ("adamw", "exp_avg"), ("adamw", "exp_avg_sq")]
)
def test_underflow_is_the_share_of_nonzero_entries_below_half_of_e4m3_s_smallest_number(recorded, optimizer, state):
    step, found, _ = recorded(optimizer)
    values = np.abs(step.flat(state))
    expected = np.count_nonzero((values > 0) & (values <= 2.0**-10)) / np.count_nonzero(values)
    assert found[f"optimizer_state/underflow_fraction/{state}/fp8-raw:min_numel=0"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("state", "beta", "power"), [("exp_avg", 0.9, 1), ("exp_avg_sq", 0.999, 2)])
def test_stalls_are_of_the_change_that_the_clipped_gradient_would_make_again(recorded, state, beta, power):
    step, found, _ = recorded("adamw")
    values = torch.from_numpy(step.flat(state)).float()
    grads = torch.from_numpy(np.concatenate([grad.reshape(-1) for grad in step.clipped.values()])).float()
    change = (1 - beta) * (grads**power - values)
    stored = values.to(torch.float8_e4m3fn).float()
    again = (stored + change).to(torch.float8_e4m3fn).float()
    expected = ((again == stored) & (change != 0)).sum() / (change != 0).sum()
    assert expected > 0.5
    tag = f"optimizer_state/stalled_fraction/{state}/fp8-raw:min_numel=0"
    # A value at the edge of two roundings may fall on either side.
    assert found[tag] == pytest.approx(expected.item(), abs=1 / len(values))


def test_quantiles_are_of_the_nonzero_magnitudes(recorded):
    step, found, _ = recorded("adamw")
    values = np.abs(step.flat("exp_avg_sq"))
    expected = np.log10(np.quantile(values[values > 0], [0.05, 0.5, 0.95], method="inverted_cdf"))
    logged = [found[f"optimizer_state/log10_quantile/exp_avg_sq/{quantile}"] for quantile in (0.05, 0.5, 0.95)]
    np.testing.assert_allclose(logged, expected, atol=0.0035)


@pytest.mark.parametrize(("optimizer", "denominator"), [("stosign", "exp_inf"), ("adamw", "exp_avg_sq")])
def test_dead_and_exploding_fractions_are_of_all_coordinates(recorded, optimizer, denominator):
    step, found, _ = recorded(optimizer)
    m, d = step.flat("exp_avg"), step.flat(denominator)
    assert found["optimizer_state/dead_fraction"] == pytest.approx(np.mean((m == 0) & (d == 0)), rel=1e-6)
    assert found["optimizer_state/exploding_fraction"] == pytest.approx(np.mean((m != 0) & (d == 0)), rel=1e-6)


def test_noise_rms_and_sign_agreement_are_of_m_over_g(recorded):
    step, found, _ = recorded("stosign")
    m, G = step.flat("exp_avg"), step.flat("exp_inf")
    u = m[G > 0] / G[G > 0]
    assert found["optimizer_state/noise_rms"] == pytest.approx(np.sqrt(np.mean(1 - u**2)), rel=1e-5)
    assert found["optimizer_state/sign_agreement"] == pytest.approx(np.mean((1 + np.abs(u)) / 2), rel=1e-5)


def test_histograms_hold_the_log10_of_the_nonzero_magnitudes(recorded):
    step, _, found = recorded("adamw")
    values = np.abs(step.flat("exp_avg_sq"))
    edges = log10_bin_edges().numpy()
    counts, _ = np.histogram(np.log10(values[values > 0]), bins=edges)
    histogram = found["optimizer_state/log10_abs/exp_avg_sq"][2]
    filled = {round(edge, 2): n for edge, n in zip(histogram.bucket_limit, histogram.bucket, strict=True) if n}
    assert filled == {round(edge, 2): n for edge, n in zip(edges[1:], counts, strict=True) if n}
    assert histogram.num == np.count_nonzero(values)
    assert (histogram.min, histogram.max) == (edges[counts.nonzero()[0][0]], edges[counts.nonzero()[0][-1] + 1])


def test_histograms_are_for_each_layer_too(recorded):
    _, _, found = recorded("adamw")
    assert found["per_layer_log10_abs/exp_avg_sq/first.weight"][2].num == 16


def test_a_state_of_zeros_only_gives_an_empty_histogram(tmp_path):
    fit(Regression("sgd", scale=lambda step: 0.0), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor()])
    assert histograms(tmp_path)["optimizer_state/log10_abs/momentum_buffer"][0].num == 0


def test_low_precision_states_are_recorded_as_the_values_they_stand_for(tmp_path):
    step = Step(2)
    fit(Regression("stosign-fp8"), tmp_path, callbacks=[OptimizerStateMonitor(), step])
    values = np.concatenate([s["exp_inf"].reshape(-1) * s["exp_inf_scale"] for s in step.states.values()])
    assert scalars(tmp_path)["optimizer_state/abs_max/exp_inf"][2] == pytest.approx(values.max(), rel=1e-6)


def test_lbfgs_s_step_is_measured_from_before_its_first_evaluation(tmp_path):
    step = Step(0)
    fit(Regression("lbfgs"), tmp_path, max_steps=1, callbacks=[OptimizerStateMonitor(), step])
    moved = np.concatenate([((step.after[n] - step.before[n]) / 0.1).reshape(-1) for n in LAYERS])
    assert scalars(tmp_path)["optimizer_state/update_rms"][0] == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-4)
