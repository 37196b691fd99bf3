from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch_optimizers import FACTORIES, OURS, stepped

from lightning_stosign import ALIAS, MuonSign, SignConverted, SignSGD, StoSignSGD
from lightning_stosign.health import UpdateRule, read_moments, register_update_rule, rules
from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

# By optimizer: the states, the numerator, the denominator, the decisive states. The parameter is a matrix.
EXPECTED = {
    "ASGD": ({"ax"}, None, None, {"ax"}),
    "Adadelta": ({"square_avg", "acc_delta"}, "grad", "square_avg", {"square_avg"}),
    "Adafactor": ({"row_var", "col_var"}, "grad", None, {"row_var", "col_var"}),
    "Adagrad": ({"sum"}, "grad", "sum", {"sum"}),
    "Adam": ({"exp_avg", "exp_avg_sq"}, "exp_avg", "exp_avg_sq", {"exp_avg_sq"}),
    "AdamW": ({"exp_avg", "exp_avg_sq"}, "exp_avg", "exp_avg_sq", {"exp_avg_sq"}),
    "Adamax": ({"exp_avg", "exp_inf"}, "exp_avg", "exp_inf", {"exp_inf"}),
    "LBFGS": ({"d", "prev_flat_grad"}, None, None, {"d", "prev_flat_grad"}),
    "Muon": ({"momentum_buffer"}, "momentum_buffer", None, {"momentum_buffer"}),
    "NAdam": ({"exp_avg", "exp_avg_sq"}, "exp_avg", "exp_avg_sq", {"exp_avg_sq"}),
    "RAdam": ({"exp_avg", "exp_avg_sq"}, "exp_avg", "exp_avg_sq", {"exp_avg_sq"}),
    "RMSprop": ({"square_avg"}, "grad", "square_avg", {"square_avg"}),
    "Rprop": ({"prev", "step_size"}, None, None, {"prev", "step_size"}),
    "SGD": ({"momentum_buffer"}, "momentum_buffer", None, {"momentum_buffer"}),
    "SparseAdam": ({"exp_avg", "exp_avg_sq"}, "exp_avg", "exp_avg_sq", {"exp_avg_sq"}),
    "StoSignSGD": ({"exp_avg", "exp_inf"}, "exp_avg", "exp_inf", {"exp_inf"}),
    "SignSGD": ({"exp_avg"}, "exp_avg", None, {"exp_avg"}),
    "MuonSign": ({"exp_avg"}, "exp_avg", None, {"exp_avg"}),
    "MuonAdamW": ({"momentum_buffer"}, "momentum_buffer", None, {"momentum_buffer"}),
}
BUILDERS = {**FACTORIES, **OURS}


def one_step(factory, grads, shape=()):
    """Return (optimizer, parameter) after a step for each gradient."""
    param = nn.Parameter(torch.ones(shape or len(grads[0])))
    optimizer = factory([param])
    for grad in grads:
        param.grad = torch.tensor(grad).reshape(param.shape)
        optimizer.step()
    return optimizer, param


def read(optimizer, param):
    return read_moments(optimizer, param, optimizer.param_groups[0])


def test_every_optimizer_of_torch_is_in_these_tests():
    names = {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    assert names == set(FACTORIES)


@pytest.mark.parametrize("name", EXPECTED)
def test_states_are_found_by_name(name):
    moments = read(*stepped(BUILDERS[name], sparse=name == "SparseAdam"))
    assert moments.states.keys() == EXPECTED[name][0]


@pytest.mark.parametrize("name", EXPECTED)
def test_numerator_is_what_the_rule_names(name):
    optimizer, param = stepped(BUILDERS[name], sparse=name == "SparseAdam")
    moments, numerator = read(optimizer, param), EXPECTED[name][1]
    expected = {None: None, "grad": param.grad}.get(numerator, optimizer.state[param].get(numerator))
    assert moments.numerator is expected


@pytest.mark.parametrize("name", EXPECTED)
def test_denominator_is_what_the_rule_names(name):
    optimizer, param = stepped(BUILDERS[name], sparse=name == "SparseAdam")
    denominator = EXPECTED[name][2]
    assert read(optimizer, param).denominator is (optimizer.state[param][denominator] if denominator else None)


@pytest.mark.parametrize("name", EXPECTED)
def test_decisive_states_are_those_without_which_the_update_fails(name):
    moments = read(*stepped(BUILDERS[name], sparse=name == "SparseAdam"))
    assert moments.decisive_names == EXPECTED[name][3]


@pytest.mark.parametrize("name", EXPECTED)
def test_only_this_package_s_stosign_is_stochastic(name):
    moments = read(*stepped(BUILDERS[name], sparse=name == "SparseAdam"))
    assert moments.stochastic_sign is (name == "StoSignSGD")


def test_in_expectation_form_is_not_stochastic():
    assert not read(*stepped(partial(StoSignSGD, stochastic=False))).stochastic_sign


@pytest.mark.parametrize("name", EXPECTED)
def test_before_the_first_step_there_are_no_states(name):
    optimizer, param = stepped(BUILDERS[name], steps=0)
    moments = read(optimizer, param)
    # Adagrad makes its state when it is built.
    assert moments.states.keys() == ({"sum"} if name == "Adagrad" else set())


def test_reading_leaves_the_optimizer_s_state_without_new_entries():
    optimizer, param = stepped(BUILDERS["AdamW"], steps=0)
    read(optimizer, param)
    assert len(optimizer.state) == 0


def test_adamw_s_moments_are_its_averages():
    moments = read(*one_step(partial(torch.optim.AdamW, betas=(0.9, 0.99)), [[2.0, 0.0]]))
    np.testing.assert_allclose(moments.numerator.numpy(), [0.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(moments.denominator.numpy(), [0.04, 0.0], rtol=1e-6)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_amsgrad_divides_by_the_largest_second_moment(cls):
    optimizer, param = one_step(partial(cls, betas=(0.9, 0.5), amsgrad=True), [[2.0], [0.0], [0.0]])
    assert read(optimizer, param).denominator.item() == pytest.approx(2.0)  # 0.5 * 2**2, now decayed to 0.5


@pytest.mark.parametrize("shape", [(), (3,)])
def test_adafactor_divides_a_vector_by_its_variance(shape):
    optimizer, param = one_step(torch.optim.Adafactor, [[1.0, 2.0, 3.0]], shape)
    moments = read(optimizer, param)
    assert moments.denominator is optimizer.state[param]["variance"]
    assert moments.decisive_names == {"variance"}


DECOUPLED = {
    "StoSignSGD": StoSignSGD,
    "SignSGD": SignSGD,
    "AdamW": torch.optim.AdamW,
    "Adam": partial(torch.optim.Adam, decoupled_weight_decay=True),
    "NAdam": partial(torch.optim.NAdam, decoupled_weight_decay=True),
    "RAdam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "Adafactor": torch.optim.Adafactor,
    "Muon": torch.optim.Muon,
}
COUPLED = {
    "Adam": torch.optim.Adam,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "Adamax": torch.optim.Adamax,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
}


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_weight_decay_is_read(name):
    optimizer, param = stepped(partial(DECOUPLED[name], lr=0.01, weight_decay=0.3))
    assert read(optimizer, param).decoupled_weight_decay == 0.3


@pytest.mark.parametrize("name", DECOUPLED)
def test_what_is_read_as_decoupled_is_what_shrinks_the_parameter(name):
    lr, decay = 0.01, 0.3
    plain, decayed = (
        stepped(partial(DECOUPLED[name], lr=lr, weight_decay=d), steps=1)[1].detach() for d in (0.0, decay)
    )
    torch.manual_seed(0)
    initial = nn.Embedding(5, 4).weight.detach()
    torch.testing.assert_close(plain - decayed, lr * decay * initial)


@pytest.mark.parametrize("name", COUPLED)
def test_weight_decay_through_the_gradient_is_not_decoupled(name):
    optimizer, param = stepped(partial(COUPLED[name], lr=0.01, weight_decay=0.3))
    assert read(optimizer, param).decoupled_weight_decay == 0.0


def values_by_hand(state, precision):
    """exp_avg as the storage format defines it, in float64."""
    stored = state["exp_avg"].double().numpy().reshape(-1)
    if precision == "fp8-raw:static_scale=1024,min_numel=0":
        return stored / 1024
    if precision.startswith("fp4-block"):
        e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        values = e2m1[np.stack([stored.astype(int) % 16, stored.astype(int) // 16], axis=1).ravel()]
        blocks = state["exp_avg_scale"].double().numpy() * state["exp_avg_scale_scale"].item()
        return (values * np.repeat(blocks, 6))[:8]
    if precision.startswith("fp8-block"):
        return stored * np.repeat(state["exp_avg_scale"].double().numpy(), 3)[: stored.size]
    return stored * state["exp_avg_scale"].item() if precision.startswith("fp8:") else stored


FP8 = [
    "fp8:min_numel=0",
    "fp8:dtype=float8_e5m2,min_numel=0",
    "fp8-raw:min_numel=0",
    "fp8-raw:static_scale=1024,min_numel=0",
    "fp8-block:block_size=3,min_numel=0",
    "fp4-block:block_size=6,min_numel=0",
]


@pytest.mark.parametrize("precision", ["bfloat16:min_numel=0", "float16:min_numel=0", *FP8])
def test_low_precision_states_are_read_as_the_values_they_stand_for(precision):
    grads = [[float(x) for x in 10.0 ** np.linspace(-4, 1, 8)]]
    optimizer, param = one_step(partial(StoSignSGD, state_precision=precision), grads, (2, 4))
    value = read(optimizer, param).states["exp_avg"]
    assert (value.dtype, value.shape) == (torch.float32, (2, 4))
    np.testing.assert_array_equal(value.double().numpy().reshape(-1), values_by_hand(optimizer.state[param], precision))


@pytest.mark.parametrize("precision", ["fp8:min_numel=0", "fp8-block:min_numel=0", "fp4-block:min_numel=0"])
def test_scales_are_not_states(precision):
    moments = read(*stepped(partial(StoSignSGD, state_precision=precision)))
    assert moments.states.keys() == {"exp_avg", "exp_inf"}


def test_a_state_whose_name_only_looks_like_a_scale_is_a_state():
    optimizer, param = stepped(BUILDERS["AdamW"])
    optimizer.state[param]["layer_scale"] = torch.ones(4)
    assert "layer_scale" in read(optimizer, param).states


def test_half_precision_parameters_states_are_read_in_float32():
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert {value.dtype for value in read(optimizer, param).states.values()} == {torch.float32}


def test_float64_states_stay_float64():
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.full_like(param, 1e-40)
    optimizer.step()
    assert read(optimizer, param).denominator.double().min() > 0


class Boxed(torch.Tensor):
    """A tensor subclass as low-bit optimizers use it: no operation but dequantize."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def dequantize(self):
        return self.codes.float() / 8

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_tensor_subclasses_are_dequantized():
    optimizer, param = stepped(BUILDERS["AdamW"])
    optimizer.state[param]["exp_avg"] = Boxed(torch.tensor([8, 0, -4]))
    states = read(optimizer, param).states
    assert type(states["exp_avg"]) is torch.Tensor
    assert states["exp_avg"].tolist() == [1.0, 0.0, -0.5]


@pytest.mark.slow
def test_torchao_s_8_bit_states_are_dequantized():
    from torchao.optim import AdamWFp8

    param = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamWFp8([param])
    param.grad = torch.linspace(1, 2, 4096).view(64, 64)
    optimizer.step()
    torch.testing.assert_close(read(optimizer, param).states["exp_avg"], 0.1 * param.grad, rtol=0.07, atol=0)


class Subclassed(torch.optim.AdamW):
    pass


def test_a_subclass_follows_its_parent_s_rule():
    optimizer, param = stepped(Subclassed)
    moments = read(optimizer, param)
    assert moments.denominator is optimizer.state[param]["exp_avg_sq"]
    assert moments.decoupled_weight_decay == 0.01


class Foreign(torch.optim.Optimizer):
    """An optimizer of another library."""

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, **options})

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        for param in self.param_groups[0]["params"]:
            self.state[param] = {"trend": param.grad.clone(), "spread": param.grad.square(), "count": 3, "flag": None}


@pytest.fixture
def own_rules(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def test_an_unknown_optimizer_has_states_but_no_numerator():
    moments = read(*stepped(Foreign))
    assert (moments.states.keys(), moments.numerator, moments.denominator) == ({"trend", "spread"}, None, None)


def test_all_states_of_an_unknown_optimizer_are_decisive():
    assert read(*stepped(Foreign)).decisive_names == {"trend", "spread"}


@pytest.mark.parametrize("option", ["weight_decouple", "decoupled_weight_decay"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_an_unknown_optimizer_s_weight_decay_is_read_from_its_options(option, decoupled):
    moments = read(*stepped(partial(Foreign, weight_decay=0.2, **{option: decoupled})))
    assert moments.decoupled_weight_decay == (0.2 if decoupled else 0.0)


def test_a_registered_rule_is_followed(own_rules):
    register_update_rule(Foreign, UpdateRule("trend", ("missing", "spread")))
    optimizer, param = stepped(Foreign)
    moments = read(optimizer, param)
    assert moments.numerator is optimizer.state[param]["trend"]
    assert moments.denominator is optimizer.state[param]["spread"]
    assert moments.decisive_names == {"spread"}


def test_a_subclass_s_own_rule_wins(own_rules):
    register_update_rule(Subclassed, UpdateRule("exp_avg_sq"))
    optimizer, param = stepped(Subclassed)
    assert read(optimizer, param).numerator is optimizer.state[param]["exp_avg_sq"]


@pytest.mark.parametrize("wrong", [torch.nn.Linear, 3, None])
def test_only_optimizer_classes_are_registered(own_rules, wrong):
    with pytest.raises(TypeError, match=r"optimizer_class=.*must be a subclass of torch\.optim\.Optimizer"):
        register_update_rule(wrong, UpdateRule())


@pytest.mark.parametrize("wrong", ["AdamW", "a.b.AdamW"])
def test_names_are_a_package_and_a_class(own_rules, wrong):
    with pytest.raises(ValueError, match=r"must be 'package\.Class', e\.g\. 'apex\.FusedAdam'"):
        register_update_rule(wrong, UpdateRule())


def test_a_class_is_found_by_the_name_it_was_registered_under(own_rules):
    register_update_rule("test_readers.Foreign", UpdateRule("trend", ("spread",)))
    optimizer, param = stepped(Foreign)
    assert read(optimizer, param).denominator is optimizer.state[param]["spread"]


def test_a_rule_can_depend_on_the_optimizer(own_rules):
    register_update_rule(Foreign, lambda optimizer: UpdateRule(optimizer.param_groups[0]["leads"]))
    optimizer, param = stepped(partial(Foreign, leads="spread"))
    assert read(optimizer, param).numerator is optimizer.state[param]["spread"]


def test_the_states_of_sign_converted_are_its_base_s_and_its_weight_decay_is_not():
    optimizer, param = stepped(lambda params: SignConverted(params, torch.optim.Adam, weight_decay=0.3))
    moments = read(optimizer, param)
    assert moments.numerator is optimizer.state[param]["exp_avg"]
    assert moments.denominator is optimizer.state[param]["exp_avg_sq"]
    assert moments.decoupled_weight_decay == 0.3
    assert moments.changes.keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("beta2", "denominator"), [(None, None), (0.99, "exp_avg_sq")])
def test_alias_decays_by_the_step_size_it_found(beta2, denominator):
    optimizer, param = stepped(partial(ALIAS, momentum=0.9, beta2=beta2, weight_decay=0.3))
    moments, state = read(optimizer, param), optimizer.state[param]
    assert moments.numerator is state["exp_avg"]
    assert moments.denominator is (state[denominator] if denominator else None)
    assert float(moments.decoupled_weight_decay) == pytest.approx(0.3 * float(optimizer.param_groups[0]["step_size"]))


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(MuonAdamW, [{"momentum_buffer"}, {"exp_avg_sq"}]), (MuonSign, [{"exp_avg"}, {"exp_inf"}])],
)
def test_a_group_s_use_muon_chooses_its_rule(cls, expected):
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = cls([{"params": [matrix], "use_muon": True}, {"params": [vector]}])
    matrix.sum().add(vector.sum()).backward()
    optimizer.step()
    decisive = [
        read_moments(optimizer, param, group).decisive_names
        for param, group in zip((matrix, vector), optimizer.param_groups, strict=True)
    ]
    assert decisive == expected


def test_a_sparse_gradient_is_no_numerator():
    assert read(*stepped(BUILDERS["Adagrad"], sparse=True)).numerator is None


def test_sign_descent_without_momentum_has_nothing_decisive():
    assert read(*stepped(partial(SignSGD, momentum=0.0))).decisive_names == set()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, StoSignSGD])
def test_a_scalar_parameters_moments_are_read(cls):
    x = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = cls([x])
    x.grad = torch.tensor(2.0)
    optimizer.step()
    moments = read_moments(optimizer, x, optimizer.param_groups[0])
    assert set(moments.states) == set(optimizer.state[x]) - {"step"}
    assert moments.denominator is not None
