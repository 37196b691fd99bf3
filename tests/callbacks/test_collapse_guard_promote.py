"""StateCollapseGuard(action="promote"): the sick layers' states move to wider storage, and training goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import fit, scalars
from scripted import DYING, HEALTHY, INF, Scripted, Underflowing, rows, run

from lightning_stosign import StateCollapseGuard
from lightning_stosign.optim.promotion import state_precision_of

LADDER = [
    "fp8-raw:min_numel=0",
    "fp8:min_numel=0",
    "fp8-block:min_numel=0",
    "bfloat16:min_numel=0",
    "float32:min_numel=0",
]

pytestmark = pytest.mark.filterwarnings("ignore:The state of .* has collapsed:RuntimeWarning")


def scripted(*script, **options):
    """As scripted, in raw E4M3."""
    return Scripted(*script, precision=LADDER[0], **options)


def promoting(**options):
    return StateCollapseGuard(**{"action": "promote", "patience": 1, "per_layer": True, **options})


def precisions(trainer, module):
    (optimizer,) = trainer.optimizers
    return {name: str(state_precision_of(optimizer, param)) for name, param in module.named_parameters()}


# ---- what moves, and when --------------------------------------------------------------------------------------------


def test_a_sick_layer_moves_and_a_healthy_one_does_not():
    module, guard = scripted(HEALTHY, {"y": DYING}, HEALTHY), promoting()
    trainer, messages = run(module, guard)
    assert guard.promotions == [{"step": 2, "layer": "y", "from": LADDER[0], "to": LADDER[1]}]
    assert precisions(trainer, module) == {"x": LADDER[0], "y": LADDER[1]}
    assert trainer.global_step == 3
    assert messages == [guard.report]
    assert messages[0].endswith("Promoted: 1 layer(s) from fp8-raw:min_numel=0 to fp8:min_numel=0.")
    assert rows(guard.report)["y"]["stored in"] == LADDER[0]


def test_of_a_collapse_of_all_layers_together_those_move_that_are_sick_themselves():
    module, guard = scripted({"x": 0.4, "y": 0.8}), promoting(per_layer=False)
    run(module, guard)
    assert guard.collapsed_at == {"exp_avg_sq": 1}
    assert [promotion["layer"] for promotion in guard.promotions] == ["y"]


def test_a_layer_that_stays_sick_climbs_the_ladder_with_the_same_patience_on_each_rung():
    module, guard = scripted(*[{"y": DYING}] * 12), promoting(patience=2)
    _, messages = run(module, guard)
    climbed = [(p["step"], p["from"], p["to"]) for p in guard.promotions]
    assert climbed == [(2 * i + 2, *LADDER[i : i + 2]) for i in range(4)]
    assert guard.collapsed_at == {"exp_avg_sq/y": 2}
    assert len(messages) == 5
    assert "Nothing can be promoted" in messages[-1]
    assert rows(messages[-1])["y"]["since step"] == "1"


def test_a_layer_that_is_sick_in_two_ways_moves_once():
    module, guard = scripted({"y": DYING}, states=["exp_avg_sq"]), promoting()
    run(module, guard)
    assert guard.collapsed_at.keys() == {"exp_avg_sq/y", "exploding_fraction/y"}
    assert len(guard.promotions) == 1


def test_a_layer_is_sick_since_its_first_sickness():
    module, guard = scripted({"y": 0.6}, {"y": 0.8}), promoting(max_dead_fraction=0.7)
    _, messages = run(module, guard)
    assert guard.collapsed_at == {"exp_avg_sq/y": 1, "dead_fraction/y": 2}
    assert rows(messages[-1])["y"]["since step"] == "1"


def test_no_precision_heals_a_value_that_is_not_finite():
    module, guard = scripted({"x": INF, "y": DYING}, {"x": INF}), promoting()
    _, messages = run(module, guard)
    assert [promotion["layer"] for promotion in guard.promotions] == ["y"]
    assert len(messages) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "stosign", "signsgd"])
def test_what_underflows_in_one_storage_trains_on_in_the_next(optimizer):
    module = Underflowing(optimizer, scale=1e-3)
    guard = promoting(patience=2)
    trainer = fit(module, callbacks=[guard], max_steps=12)
    assert {promotion["step"] for promotion in guard.promotions} == {2}
    assert set(precisions(trainer, module).values()) == {LADDER[1]}
    (optimizer,) = trainer.optimizers
    assert not any(
        (value.float() == 0).all() for s in optimizer.state.values() for value in s.values() if torch.is_tensor(value)
    )


# ---- what cannot move ------------------------------------------------------------------------------------------------


def test_what_nothing_wider_is_known_of_is_warned_about_once():
    guard = promoting(per_layer=False)
    with pytest.warns(UserWarning, match="can only warn about AdamW: its states are stored in a way of its own"):
        trainer = fit(Scripted(*[DYING] * 3), callbacks=[guard], max_steps=3)
    assert trainer.global_step == 3
    assert "Nothing can be promoted" in guard.report
    assert (guard.collapsed_at, guard.promotions) == ({"exp_avg_sq": 1}, [])


@pytest.mark.parametrize("per_layer", [True, False])
def test_it_is_said_once_that_nothing_can_be_promoted(per_layer):
    _, messages = run(Scripted(*[DYING] * 5), promoting(per_layer=per_layer))
    assert len(messages) == 1


# ---- records and checkpoints -----------------------------------------------------------------------------------------


def test_the_number_of_promotions_is_logged(tmp_path):
    guard = promoting()
    run(scripted({"x": DYING}, {"x": DYING, "y": DYING}, HEALTHY), guard, folder=tmp_path)
    assert scalars(tmp_path)["optimizer_state/promotions"] == {0: 1, 1: 3}


def outcome(trainer, module, guard):
    (optimizer,) = trainer.optimizers
    return module.state_dict(), optimizer.state_dict()["state"], guard.state_dict()


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.double(), b.double())
    else:
        assert a == b


@pytest.mark.parametrize("optimizer", ["adamw", "stosign", "signsgd"])
@pytest.mark.parametrize("at", [1, 3, 5])  # before the first promotion, after it, after the second one
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer, at):
    def train(steps, **options):
        module, guard = Underflowing(optimizer, scale=1e-3), promoting(patience=2, max_zero_fraction=0.02)
        module.drop.p = 0.0
        # One batch an epoch: what a checkpoint in the middle of an epoch does to data is not what is tested here.
        return fit(module, callbacks=[guard], max_steps=steps, limit_train_batches=1, **options), module, guard

    whole = train(8)
    assert len({promotion["step"] for promotion in whole[2].promotions}) >= 2
    train(at)[0].save_checkpoint(tmp_path / "a.ckpt")
    resumed = train(8, ckpt_path=tmp_path / "a.ckpt")
    for a, b in zip(outcome(*whole), outcome(*resumed), strict=True):
        assert_same(a, b)


# ---- on several ranks ------------------------------------------------------------------------------------------------


def on_ranks(folder, strategy, devices, optimizer, steps):
    folder.mkdir()
    script = str(Path(__file__).with_name("guard_script.py"))
    result = subprocess.run(
        [sys.executable, script, str(folder), strategy, str(devices), optimizer, str(steps)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "optimizer", "steps", "promoted_at"),
    [
        ("ddp", "stosign", 8, {2, 4, 6, 8}),
        ("fsdp2", "adamw", 8, {2, 4, 6, 8}),
        ("fsdp2", "stosign", 3, {2}),  # its next storage would be another than that of unsharded states
    ],
)
def test_all_ranks_promote_alike_and_as_a_single_process(tmp_path, strategy, optimizer, steps, promoted_at):
    (alone,) = on_ranks(tmp_path / "alone", "auto", 1, optimizer, steps)
    assert {promotion["step"] for promotion in alone["guard"]["promotions"]} == promoted_at
    for rank in on_ranks(tmp_path / "ranks", strategy, 2, optimizer, steps):
        assert_same(rank, alone)
