import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_stosign import StatePrecision
from lightning_stosign.optim.states.state_precision import FP4_DTYPE

NAMES = ["float32", "bfloat16", "float16", "fp8", "fp8-raw", "fp8-block", "fp4-block"]
POWERS = st.integers(-20, 20).map(lambda k: 2.0**k)


@st.composite
def precisions(draw):
    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, *fp8, FP4_DTYPE]))
    limited = dtype not in (torch.float32, torch.bfloat16)
    scaling = draw(st.sampled_from(["none", "tensor", "block"])) if limited else "none"
    scaling, step = ("block", 2) if dtype is FP4_DTYPE else (scaling, 1)
    return StatePrecision(
        dtype,
        scaling,
        block_size=step * draw(st.integers(1, 1 << 20)),
        stochastic_rounding=dtype is not torch.float32 and draw(st.booleans()),
        static_scale=draw(POWERS) if limited and scaling == "none" else 1.0,
        min_numel=draw(st.integers(0, 1 << 20)),
    )


@given(precisions())
def test_name_reads_back_as_the_same_value(precision):
    assert StatePrecision.parse(str(precision)) == precision


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_its_own_name(name):
    assert str(StatePrecision.parse(name)) == name


def test_presets_are_those_of_the_design():
    e4m3 = torch.float8_e4m3fn
    assert [StatePrecision.parse(name) for name in NAMES] == [
        StatePrecision(torch.float32),
        StatePrecision(torch.bfloat16),
        StatePrecision(torch.float16),
        StatePrecision(e4m3, "tensor"),
        StatePrecision(e4m3, "none"),
        StatePrecision(e4m3, "block", block_size=128),
        StatePrecision(FP4_DTYPE, "block", block_size=16),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.int8}, ValueError, "dtype=torch.int8"),
        ({"dtype": "fp4"}, ValueError, "dtype='fp4'"),
        ({"scaling": "row"}, ValueError, "scaling='row'"),
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"block_size": 1.5}, TypeError, "block_size=1.5"),
        ({"min_numel": -1}, ValueError, "min_numel=-1"),
        ({"min_numel": True}, TypeError, "min_numel=True"),
        ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding=1"),
        ({"static_scale": 0.0}, ValueError, "static_scale=0.0"),
        ({"static_scale": 3.0}, ValueError, "static_scale=3.0 must be a power of two"),
        ({"static_scale": -2.0}, ValueError, "static_scale=-2.0"),
        ({"static_scale": float("nan")}, ValueError, "static_scale=nan"),
        ({"static_scale": float("inf")}, ValueError, "static_scale=inf"),
        ({"static_scale": "2"}, TypeError, "static_scale='2'"),
        ({"scaling": "tensor", "static_scale": 2.0}, ValueError, "static_scale=2.0 applies to scaling='none'"),
        ({"dtype": torch.float32, "static_scale": 2.0}, ValueError, "static_scale=2.0"),
        ({"dtype": FP4_DTYPE}, ValueError, "scaling='none', block_size=128 .* four bits need scaling='block'"),
        ({"dtype": FP4_DTYPE, "scaling": "tensor"}, ValueError, "scaling='tensor', block_size=128"),
        ({"dtype": FP4_DTYPE, "scaling": "block", "block_size": 15}, ValueError, "block_size=15 .* an even block_size"),
        ({"dtype": torch.bfloat16, "scaling": "block"}, ValueError, "scaling='block' has no use"),
        ({"dtype": torch.float32, "stochastic_rounding": True}, ValueError, "stochastic_rounding=True"),
    ],
)
def test_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        StatePrecision(**{"dtype": torch.float8_e4m3fn, **arguments})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("fp9", ValueError, "state_precision='fp9' is unknown; accepted: float32, bfloat16"),
        ("fp8:colour=red", ValueError, "cannot read 'colour=red'; accepted after the colon: dtype"),
        ("fp8:block_size=x", ValueError, "cannot read 'block_size=x'"),
        ("fp8:stochastic_rounding=2", ValueError, "cannot read 'stochastic_rounding=2'"),
        (8, TypeError, "state_precision=8"),
    ],
)
def test_bad_name_is_named(spec, error, message):
    with pytest.raises(error, match=message):
        StatePrecision.parse(spec)
