"""The substitute for TE's compiled module computes what TE's own references do, and refuses what a GPU refuses."""

import inspect
from typing import Any

import pytest
import te_cpu
import torch
from te_cpu import formats


def fields(tensor: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensor.get_metadata().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kFloat8E4M3", "kFloat8E5M2"])
def test_one_scale_per_tensor_has_the_bits_of_te_s_reference(
    te: Any, since: Any, kind: str, dtype: torch.dtype
) -> None:
    since("2.20", "the reference")
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    torch.manual_seed(0)
    for scale in (1e-6, 1.0, 1e4):
        values = (scale * torch.randn(64, 48)).to(dtype)
        low = te.Float8CurrentScalingQuantizer(DType[kind], device=torch.device("cpu"))(values)
        reference = CurrentScalingQuantizerRef(formats.torch_dtype(DType[kind]), rowwise=True, columnwise=True)
        truth = reference.quantize(values)
        assert torch.equal(low._data, truth.data.view(torch.uint8))
        assert torch.equal(low._scale_inv.flatten(), truth.scale.flatten())


def test_e2m1_rounds_to_nearest_and_ties_to_even() -> None:
    values = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.2, -0.3, -2.4, -2.6, 0.0, 0.5, 4.9, 5.1]])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0.0, -0.5, -2.0, -3.0, 0.0, 0.5, 4.0, 6.0]
    data, scales = formats.encode_nvfp4(values, torch.tensor([6.0]), square=False, stochastic=False)
    decoded = formats.decode_nvfp4(data, scales, torch.tensor([6.0]))
    assert decoded[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("stochastic", [True, False])
def test_nvfp4_errs_by_a_sixth_at_most_and_stochastic_rounding_by_nothing_on_average(stochastic: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(16, 64)
    amax = values.abs().amax().reshape(1)
    rounds = [
        formats.decode_nvfp4(*formats.encode_nvfp4(values, amax, square=False, stochastic=stochastic), amax)
        for _ in range(2000 if stochastic else 1)
    ]
    block_amax = values.view(16, 4, 16).abs().amax(-1, keepdim=True).expand(16, 4, 16).reshape(16, 64)
    assert ((rounds[0] - values).abs() <= (1 / 3 if stochastic else 1 / 5) * block_amax).all()
    if stochastic:
        # A block's largest value may lie above what its rounded scale reaches: it is cut, not rounded.
        inside = values.abs() < 0.9 * block_amax
        error = (torch.stack(rounds).mean(0) - values)[inside]
        assert error.abs().max() < 5 * 0.5 / 2000**0.5 * block_amax.max() / 3


@pytest.mark.parametrize(
    ("recipe", "capability"), [("Float8BlockScaling", te_cpu.H100), ("MXFP8BlockScaling", te_cpu.B200)]
)
def test_both_directions_hold_the_same_values_to_the_format_s_precision(
    te: Any, on_gpu: Any, recipe: str, capability: tuple[int, int]
) -> None:
    from te_cpu.quantized import values_of
    from transformer_engine.common import recipe as recipes

    on_gpu(capability)
    torch.manual_seed(0)
    with te.quantized_model_init(enabled=True, recipe=getattr(recipes, recipe)()):
        layer = te.Linear(256, 128, bias=False, params_dtype=torch.float32)
    exact = layer.weight.dequantize()
    torch.testing.assert_close(values_of(layer.weight, by_column=True), exact, rtol=1 / 8, atol=1e-4)


def test_a_gpu_s_rules_for_sizes_hold(te: Any) -> None:
    layer = te.Linear(32, 16, device="cpu")
    layer(torch.randn(9, 32))  # outside of autocast anything goes
    with te.autocast(enabled=True), pytest.raises((AssertionError, ValueError), match="divisible by 8"):
        layer(torch.randn(9, 32))
    narrow = te.Linear(32, 8, device="cpu")
    with te.autocast(enabled=True), pytest.raises(RuntimeError, match="multiple"):
        narrow(torch.randn(16, 32, requires_grad=True)).sum().backward()


# Arguments of TE that the package passes

USED = {
    "Linear": {"bias", "params_dtype", "device", "init_method"},
    "LayerNorm": {"eps", "device", "dtype"},
    "RMSNorm": {"eps", "device", "dtype"},
    "LayerNormLinear": {"eps", "bias", "normalization", "params_dtype", "device"},
    "LayerNormMLP": {"eps", "bias", "normalization", "params_dtype", "device", "activation"},
    "autocast": {"enabled", "recipe", "amax_reduction_group"},
    "quantized_model_init": {"enabled", "recipe", "preserve_high_precision_init_val"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", USED)
def test_te_takes_the_arguments_that_the_package_passes(te: Any, name: str) -> None:
    signatures = [inspect.signature(base.__init__) for base in getattr(getattr(te, name), "__mro__", [])]
    signatures = signatures or [inspect.signature(getattr(te, name))]
    assert USED[name] <= {parameter for signature in signatures for parameter in signature.parameters}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Linear", "LayerNormLinear", "LayerNormMLP", "LayerNorm", "RMSNorm"])
def test_a_layer_is_called_with_its_input_alone(te: Any, name: str) -> None:
    signature = inspect.signature(getattr(te, name).forward)
    signature.bind(None, torch.zeros(()))
