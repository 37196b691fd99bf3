import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inspection.checkpoints import lightning_file
from torch import nn

from lightning_stosign.inspection.folders import read_checkpoint
from lightning_stosign.inspection.parameter_names import candidates_of, match_names, parameter_shape


@st.composite
def _models(draw):
    """Weights, and param groups that take some of them, each in the weights' order."""
    shapes = draw(st.lists(st.sampled_from([(2,), (3,), (2, 2), (3, 2)]), min_size=1, max_size=12))
    weights = [(f"w{i}", shape) for i, shape in enumerate(shapes)]
    taken = draw(st.lists(st.integers(-1, 2), min_size=len(weights), max_size=len(weights)))
    return weights, [[i for i, group in enumerate(taken) if group == number] for number in range(3)]


@given(_models(), st.data())
def test_a_name_is_never_wrong(model, data):
    weights, groups = model
    unknown = data.draw(st.sets(st.integers(0, len(weights) - 1)))
    shapes = [[None if i in unknown else weights[i][1] for i in group] for group in groups]
    for group, names in zip(groups, match_names(shapes, weights), strict=True):
        assert all(name in (None, weights[i][0]) for i, name in zip(group, names, strict=True))


@given(_models())
def test_one_group_with_all_weights_is_named_in_full(model):
    weights, _ = model
    assert match_names([[shape for _, shape in weights]], weights) == [[name for name, _ in weights]]


@given(st.lists(st.sampled_from([(2,), (3,), (2, 2), (3, 2)]), min_size=1, max_size=12))
def test_matrices_and_vectors_in_groups_of_their_own_are_named_in_full(shapes):
    weights = [(f"w{i}", shape) for i, shape in enumerate(shapes)]
    groups = [[w for w in weights if len(w[1]) == 2], [w for w in weights if len(w[1]) == 1]]
    names = match_names([[shape for _, shape in group] for group in groups], weights)
    assert names == [[name for name, _ in group] for group in groups]


def test_an_ambiguous_parameter_keeps_its_number():
    weights = [("a", (2,)), ("b", (2,)), ("c", (3,))]
    assert match_names([[(2,), (3,)]], weights) == [[None, "c"]]  # a or b was frozen


def test_what_one_group_takes_for_certain_the_others_do_not():
    weights = [("a", (2,)), ("b", (3,)), ("c", (2,))]
    # the second group has c, or b and then c cannot come: a is left for the first
    assert match_names([[(2,)], [(3,), (2,)]], weights) == [["a"], ["b", "c"]]


def test_a_group_that_does_not_fit_is_left_without_names():
    assert match_names([[(5,)], [(2,)]], [("a", (2,))]) == [[None], ["a"]]


def test_tied_weights_count_once_and_buffers_of_norms_not_at_all(tmp_path):
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    weights = read_checkpoint(lightning_file(tmp_path / "x.ckpt", state_dict=model.state_dict())).weights
    names = [name for name, _ in candidates_of(weights)]
    assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("state", "shape"),
    [
        ({"step": torch.tensor(1.0)}, None),
        ({"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 2), "exp_avg_sq": torch.zeros(3, 2)}, (3, 2)),
        ({"row_var": torch.zeros(3, 1), "col_var": torch.zeros(1, 2)}, (3, 2)),
        ({"exp_avg": torch.zeros(40, 8).to(torch.float8_e4m3fn), "exp_avg_scale": torch.ones(3)}, (40, 8)),
        ({"state1": torch.ones(64, 9, dtype=torch.uint8), "qmap1": torch.ones(256), "max1": torch.ones(1)}, (64, 9)),
        ({"precondition_frequency": 3, "Q": [torch.zeros(9)]}, None),
    ],
)  # fmt: skip
def test_the_parameter_s_shape_is_told_by_its_states(state, shape):
    assert parameter_shape(state) == shape
