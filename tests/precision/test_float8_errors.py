import sys
from typing import Any

import pytest
import torch
from torch import nn

from lightning_stosign.precision import Float8Precision, te_backend


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"recipe": "hybrid"}, ValueError, ["recipe", "'hybrid'", "'current'", "'rowwise'", "'delayed'", "'mxfp8'"]),
        ({"recipe": 8}, TypeError, ["recipe", "8", "int", "'current'"]),
        ({"recipe": None}, TypeError, ["recipe", "None", "NoneType", "'current'"]),
        (
            {"recipe": "mxfp8", "backend": "torchao"},
            ValueError,
            ["recipe='mxfp8'", "'torchao'", "'current'", "'rowwise'"],
        ),
        ({"recipe": "delayed"}, ValueError, ["recipe='delayed'", "'torchao'", "backend='auto'", "no CUDA device"]),
        ({"backend": "te"}, ValueError, ["backend", "'te'", "'auto'", "'transformer-engine'", "'torchao'"]),
        ({"backend": None}, TypeError, ["backend", "None", "NoneType", "'auto'"]),
        (
            {"backend": "transformer-engine"},
            ValueError,
            ["backend='transformer-engine'", "no CUDA device", "Use backend='torchao'"],
        ),
        ({"weights_dtype": torch.float64}, ValueError, ["weights_dtype", "torch.float64", "'float32'", "'bfloat16'"]),
        ({"weights_dtype": "bf16"}, ValueError, ["weights_dtype", "'bf16'", "'float32'", "'bfloat16'"]),
        ({"weights_dtype": 16}, TypeError, ["weights_dtype", "16", "int"]),
        ({"pad": 16}, TypeError, ["pad", "16", "int"]),
        ({"fuse": True}, ValueError, ["fuse=True", "'torchao'", "backend='transformer-engine'"]),
        ({"quantized_weights": True}, ValueError, ["quantized_weights=True", "'torchao'", "'transformer-engine'"]),
        (
            {"float8_all_gather": True, "recipe": "rowwise"},
            ValueError,
            ["float8_all_gather=True", "'rowwise'", "backend='torchao' with recipe='current'"],
        ),
        ({"recipe": {"name": "rowwise", "margin": 1}}, ValueError, ["['margin']", "'rowwise'", "none here"]),
        (
            {"recipe": {"name": "mxfp8", "disable_rht": True}},
            ValueError,
            ["['disable_rht']", "'mxfp8'", "none here"],
        ),
        ({"recipe": {"name": "nvfp4", "disable_rht": 1}}, TypeError, ["disable_rht", "bool", "1"]),
        ({"exclude": "*head*"}, TypeError, ["exclude", "['*head*']"]),
        ({"exclude": [1]}, TypeError, ["exclude", "[1]"]),
        ({"exclude": 1}, TypeError, ["exclude", "1"]),
        ({"exclude": None}, TypeError, ["exclude", "None"]),
    ],
)
def test_bad_arguments_are_named_with_their_value_and_range(
    no_cuda: None, arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as raised:
        Float8Precision(**arguments)
    for part in parts:
        assert part in str(raised.value)


def test_te_on_an_old_gpu_names_both_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: (8, 6))
    with pytest.raises(ValueError, match=r"backend='transformer-engine'.*capability 8\.6.*8\.9 or higher.*'torchao'"):
        Float8Precision(backend="transformer-engine")


@pytest.mark.parametrize("kind", ["missing", "without its compiled part"])
def test_te_that_cannot_be_imported_is_absent_and_the_reason_is_told(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(te_backend, "cuda_capability", lambda: (9, 0))
    if kind == "missing":
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
        reason = "ModuleNotFoundError"
    else:

        def import_module(name: str) -> Any:
            raise RuntimeError("Found empty meta package")

        monkeypatch.setattr(te_backend.importlib, "import_module", import_module)
        reason = "RuntimeError: Found empty meta package"
    with pytest.raises(ValueError, match=rf"{reason}.*`pip install lightning-stosign\[te\]`"):
        Float8Precision(backend="transformer-engine")
    assert Float8Precision().backend == "torchao"


@pytest.mark.parametrize(
    ("model", "exclude", "parts"),
    [
        (nn.Sequential(nn.ReLU()), [], ["Sequential", "0 nn.Linear layers"]),
        (nn.Sequential(nn.Linear(10, 16)), [], ["1 nn.Linear layers", "1 have sizes", "multiples of 16: 0 (10 -> 16)"]),
        (nn.Sequential(nn.Linear(16, 16)), ["*"], ["1 nn.Linear layers", "1 are left out by exclude=['*']"]),
        (nn.Linear(16, 16), [], ["Linear", "0 nn.Linear layers"]),
    ],
)
def test_a_model_without_a_layer_to_convert_is_refused(model: nn.Module, exclude: list[str], parts: list[str]) -> None:
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="found no layer to convert") as raised:
        Float8Precision(backend="torchao", weights_dtype="bfloat16", exclude=exclude).convert_module(model)
    for part in parts:
        assert part in str(raised.value)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before
