from typing import Any

import pytest
import torch
from float8_models import Net, batches, net, te_plugin, trainer
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


def test_state_dict_keys_are_those_of_the_unconverted_model(te: Any) -> None:
    model = net()
    keys = list(model.state_dict())
    te_plugin().convert_module(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(net(seed=7).state_dict())
    assert torch.equal(model.first.weight, net(seed=7).first.weight)


def test_a_key_that_is_really_missing_is_still_reported(te: Any) -> None:
    model = net()
    te_plugin().convert_module(model)
    state = model.state_dict()
    del state["first.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"first.weight"\.'):
        model.load_state_dict(state)


@pytest.mark.parametrize("save_weights_only", [False, True])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_checkpoint_loads_into_converted_and_unconverted_models(
    te: Any, recipe: str, save_weights_only: bool, tmp_path: Any, monkeypatch: Any
) -> None:
    if recipe == "delayed":
        monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    model = net()
    run = trainer(te_plugin(recipe=recipe), steps=2)
    run.fit(model, batches())
    path = tmp_path / "two.ckpt"
    run.save_checkpoint(path, weights_only=save_weights_only)
    fresh = Net.load_from_checkpoint(path, weights_only=True)
    assert type(fresh.first) is nn.Linear
    assert torch.equal(fresh.first.weight, model.first.weight)
    run.test(model, batches(1), ckpt_path=path, verbose=False, weights_only=True)
    trainer().test(net(), batches(1), ckpt_path=path, verbose=False, weights_only=True)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_run_resumes_bit_for_bit_with_its_scaling_histories(
    te: Any, recipe: str, tmp_path: Any, monkeypatch: Any
) -> None:
    if recipe == "delayed":
        monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    uninterrupted = net()
    trainer(te_plugin(recipe=recipe), steps=6).fit(uninterrupted, batches(1))
    first = trainer(te_plugin(recipe=recipe), steps=2)
    first.fit(net(), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = net(seed=7)
    trainer(te_plugin(recipe=recipe), steps=6).fit(
        resumed, batches(1), ckpt_path=tmp_path / "two.ckpt", weights_only=True
    )
    assert resumed.losses == uninterrupted.losses[2:]
    if recipe == "delayed":
        for direction in ("scaling_fwd", "scaling_bwd"):
            meta, truth = (run.first.fp8_meta[direction] for run in (resumed, uninterrupted))
            assert torch.equal(meta.amax_history, truth.amax_history)
            assert (truth.amax_history != 0).any(1).sum() == 6
            assert torch.equal(meta.scale, truth.scale)


def test_te_s_refusal_to_unpickle_reaches_the_user(te: Any, since: Any, tmp_path: Any) -> None:
    since("2.20", "TE refuses pickles")
    first = trainer(te_plugin(recipe="delayed"), steps=2)
    first.fit(net(), batches())
    first.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1"):
        trainer(te_plugin(recipe="delayed"), steps=4).fit(net(), batches(), ckpt_path=tmp_path / "two.ckpt")
    # A stateless recipe has no use for the histories, and does not ask.
    trainer(te_plugin(recipe="current"), steps=4).fit(net(), batches(), ckpt_path=tmp_path / "two.ckpt")


def test_histories_of_layers_that_are_no_longer_in_fp8_are_reported(te: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    first = trainer(te_plugin(recipe="delayed"), steps=2)
    first.fit(net(), batches())
    first.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match=r"histories of layers that are not in FP8 now: \['middle'\]"):
        trainer(te_plugin(recipe="delayed", exclude=["middle"]), steps=4).fit(
            net(), batches(), ckpt_path=tmp_path / "two.ckpt"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_model_learns_and_its_checkpoint_loads(te: Any, recipe: str, weights_dtype: str, tmp_path: Any) -> None:
    model = net()
    run = trainer(te_plugin(recipe=recipe, weights_dtype=weights_dtype), steps=40, accelerator="auto")
    run.fit(model, batches(4))
    assert isinstance(model.first, te.Linear)
    assert sum(model.losses[-4:]) < 0.5 * sum(model.losses[:4])
    run.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Net.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(fresh.first.weight.cpu(), model.first.weight.float().cpu())
