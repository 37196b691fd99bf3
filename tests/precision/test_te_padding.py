"""Tokens and features that Transformer Engine cannot take are filled up with zeros, unseen by the user."""

import copy
from typing import Any

import pytest
import torch
from float8_models import Wrapped, te_plugin
from torch import nn


@pytest.mark.parametrize(("recipe", "multiple"), [("current", 16), ("delayed", 16), ("block", 128)])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (7,), (0,), (128,)])
def test_te_gets_multiples_of_tokens_and_the_user_gets_his_own(
    te: Any, monkeypatch: pytest.MonkeyPatch, recipe: str, multiple: int, shape: tuple[int, ...]
) -> None:
    seen: list[int] = []
    forward = te.Linear.forward

    def recording(layer: nn.Module, inp: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(inp.shape[:-1].numel())
        return forward(layer, inp, *rest, **options)

    monkeypatch.setattr(te.Linear, "forward", recording)
    model = Wrapped(layer=nn.Linear(128, 128))
    truth = copy.deepcopy(model.layer)
    float8 = te_plugin(recipe=recipe)
    float8.convert_module(model)
    inputs = torch.randn(*shape, 128, requires_grad=True)
    with float8.forward_context():
        output = model.layer(inputs)
    assert seen[0] % multiple == 0
    expected = truth(inputs)
    assert output.shape == expected.shape
    assert (output - expected).norm() <= 0.1 * expected.norm()
    output.sum().backward()
    assert inputs.grad.shape == inputs.shape


def test_te_pads_sizes_too(te: Any) -> None:
    torch.manual_seed(0)
    model = Wrapped(layer=nn.Linear(33, 70), fits=nn.Linear(32, 32))
    truth = copy.deepcopy(model.layer)
    float8 = te_plugin(recipe="delayed", pad=True)
    float8.convert_module(model)
    assert isinstance(model.layer.inner, te.Linear)
    inputs = torch.randn(5, 33)
    with float8.forward_context():
        output = model.layer(inputs)
    expected = truth(inputs)
    assert (output - expected).norm() <= 0.1 * expected.norm()
    assert set(float8.state_dict()["layers"]) == {"layer"}
    assert list(model.layer.state_dict()) == ["weight", "bias"]
