"""Float8Monitor beside Transformer Engine's own layers."""

from typing import Any

import pytest
import te_cpu
import torch
from float8_models import Wide, batches, net, te_plugin, trainer

from lightning_stosign import Float8Monitor

pytestmark = pytest.mark.filterwarnings("ignore:Float8Precision leaves these layers")


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_the_layers_are_seen_and_the_weights_keep_their_bits(te: Any, on_gpu: Any, recipe: str) -> None:
    on_gpu(te_cpu.H100)
    monitor = Float8Monitor(every_n_steps=2)
    watched, plain = net(model=Wide), net(model=Wide)
    run = trainer(te_plugin(recipe=recipe), 4, callbacks=[monitor])
    run.fit(watched, batches(4))
    trainer(te_plugin(recipe=recipe), 4).fit(plain, batches(4))
    for name, parameter in watched.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert set(monitor._worst_products[recipe]) == {"first", "middle", "last", "head"}
    if recipe == "current":
        assert monitor.recommend()["exclude"] == []
    assert "float8/stale_scale_fraction/input" in run.callback_metrics or recipe == "current"
