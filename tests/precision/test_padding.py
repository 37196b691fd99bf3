import copy
from typing import Any

import pytest
import torch
from float8_models import ScaledMMs, Wrapped, batches, net, torchao_plugin, trainer
from torch import nn

from lightning_stosign.precision import Float8Precision
from lightning_stosign.precision._padding import PaddedLinear


def odd_model() -> Wrapped:
    torch.manual_seed(0)
    return Wrapped(layer=nn.Linear(33, 70), fits=nn.Linear(32, 32))


def test_layers_of_any_size_are_converted(recwarn: pytest.WarningsRecorder) -> None:
    model = odd_model()
    before = dict(model.named_parameters())
    torchao_plugin(pad=True).convert_module(model)
    assert isinstance(model.layer, PaddedLinear)
    assert not isinstance(model.fits, PaddedLinear)
    assert {name: id(value) for name, value in model.named_parameters()} == {n: id(v) for n, v in before.items()}
    assert not recwarn.list


def test_a_gpu_would_take_every_product() -> None:
    model = torchao_plugin(pad=True).convert_module(odd_model())
    with ScaledMMs() as products:
        model.layer(torch.randn(3, 5, 33, requires_grad=True)).sum().backward()
    assert len(products.shapes) == 3
    for (_, inner), (_, columns) in products.shapes:
        assert inner % 16 == columns % 16 == 0


@pytest.mark.parametrize("recipe", ["current", "rowwise", "block", "mxfp8"])
def test_zeros_change_no_value(recipe: str) -> None:
    """The layer equals one of the larger size whose additional weights are zero."""
    small = odd_model()
    large = Wrapped(layer=nn.Linear(128, 128))
    with torch.no_grad():
        for parameter, source in zip(large.layer.parameters(), small.layer.parameters(), strict=True):
            parameter.zero_()
            parameter[tuple(slice(size) for size in source.shape)] = source
    Float8Precision(recipe, pad=True).convert_module(small)
    Float8Precision(recipe).convert_module(large)
    inputs = torch.randn(64, 33)
    padded = nn.functional.pad(inputs, (0, 95))
    upstream = torch.randn(64, 70)

    leaves = [inputs.requires_grad_(), padded.detach().requires_grad_()]
    output, truth = small.layer(leaves[0]), large.layer(leaves[1])[:, :70]
    for result in (output, truth):
        result.backward(upstream)
    for value, expected in (
        (output, truth),
        (leaves[0].grad, leaves[1].grad[:, :33]),
        (small.layer.weight.grad, large.layer.weight.grad[:70, :33]),
        (small.layer.bias.grad, large.layer.bias.grad[:70]),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_a_padded_model_trains_resumes_and_loads_into_an_unconverted_one(tmp_path: Any) -> None:
    uninterrupted = net()
    trainer(torchao_plugin(pad=True), steps=4).fit(uninterrupted, batches(1))
    first = trainer(torchao_plugin(pad=True), steps=2)
    first.fit(net(), batches(1))
    first.save_checkpoint(tmp_path / "two.ckpt")
    resumed = net(seed=7)
    trainer(torchao_plugin(pad=True), steps=4).fit(
        resumed, batches(1), ckpt_path=tmp_path / "two.ckpt", weights_only=True
    )
    assert resumed.losses == uninterrupted.losses[2:]
    net(seed=7).load_state_dict(resumed.state_dict())


def test_a_second_conversion_and_a_copy_change_nothing() -> None:
    model, float8 = Wrapped(layer=nn.Linear(33, 70)), torchao_plugin(pad=True)
    float8.convert_module(model)
    layer, inputs = model.layer, torch.randn(2, 33)
    float8.convert_module(model)
    assert model.layer is layer
    assert torch.equal(copy.deepcopy(model).layer(inputs), layer(inputs))


def test_parameters_that_come_from_meta_are_initialised_as_torch_does() -> None:
    with torch.device("meta"):
        model = Wrapped(layer=nn.Linear(33, 70))
    torchao_plugin(pad=True).convert_module(model)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.layer.reset_parameters()
    torch.manual_seed(3)
    truth = nn.Linear(33, 70)
    assert torch.equal(model.layer.weight, truth.weight)
    assert torch.equal(model.layer.bias, truth.bias)
