"""The memory benchmark counts the bytes that a Lightning run holds."""

import memory
import pytest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AdamW, mixed precision", (4, 4, 8)),
        ("MuonSign, bfloat16, fp8", (2, 2, 1)),
        # The largest gradient of one layer is that of a third of its matrices.
        ("StoSignSGD, bfloat16, fp8, release", (2, 2 / 3, 2)),
    ],
)
def test_bytes_per_parameter_are_those_of_the_tensors(name, expected):
    found = memory.fit(memory.METHODS[name], 1, 256)
    assert (found["weights"], found["gradients"], found["states"]) == pytest.approx(expected, rel=0.2)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match=r"match none; accepted: AdamW, mixed precision"):
        memory.benchmark(methods=["nothing"])
