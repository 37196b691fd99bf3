"""Activation checkpointing computes layers again in backward: in FP8, with the scales of forward, and unnoticed."""

from typing import Any

import pytest
import te_cpu
import torch
from float8_models import Blocks, batches, net, te_plugin, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        ("current", te_cpu.H100),
        ("delayed", te_cpu.H100),
        ({"name": "delayed", "amax_compute_algo": "most_recent"}, te_cpu.H100),
        ("block", te_cpu.H100),
        ("mxfp8", te_cpu.B200),
    ],
)
def test_a_checkpointed_run_is_the_plain_run_bit_for_bit(
    te: Any, on_gpu: Any, recipe: Any, capability: tuple[int, int], mode: str
) -> None:
    on_gpu(capability)
    runs = []
    for kind in ("plain", mode):
        model = net(model=Blocks)
        model.mode = kind
        plugin = te_plugin(recipe=recipe, weights_dtype="bfloat16", exclude=["into"])
        trainer(plugin, steps=6, accumulate_grad_batches=2).fit(model, batches(2))
        runs.append(model)
    plain, checkpointed = runs
    assert checkpointed.losses == plain.losses
    assert len(plain.losses) == 12
    for (name, one), other in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(checkpointed.modules(), plain.modules(), strict=True):
        for direction in ("scaling_fwd", "scaling_bwd"):
            if (meta := getattr(one, "fp8_meta", {}).get(direction)) is not None and hasattr(meta, "amax_history"):
                assert torch.equal(meta.scale, other.fp8_meta[direction].scale)
                assert torch.equal(meta.amax_history, other.fp8_meta[direction].amax_history)
