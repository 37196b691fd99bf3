"""Converted layers compute the same in training, evaluation and inference, with no tokens, and under checkpointing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_stosign import Float8Precision

RECIPES = ["current", "rowwise", "block", "mxfp8", "nvfp4", "mxfp4"]
N = 128

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:.*reentrant")


def converted(model, recipe, **options):
    plugin = Float8Precision(recipe, **options)
    return plugin.convert_module(model), plugin


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Keys and values of other sizes than the queries, whose projections are separate weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(N, 4, batch_first=True)
        self.head = nn.Linear(N, N)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(N, 4, N, dropout=0.0, batch_first=True, **options)


MODELS = {
    "encoder layer": encoder_layer,
    "gelu, norm first": lambda: encoder_layer(activation="gelu", norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2),
    "decoder layer": lambda: Decoder(),
    "attention": Attention,
}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(N, 4, N, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("inside", [True, False], ids=["in the plugin's context", "outside"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", ["current", "mxfp8"])
def test_transformers_compute_the_same_in_every_mode(recipe, model, inside):
    torch.manual_seed(0)
    module, plugin = converted(MODELS[model](), recipe)
    x = tokens(2, 16, N)

    def run():
        if not inside:
            return module(x).detach().clone()
        with plugin.forward_context():
            return module(x).detach().clone()

    trained = run()
    module.eval()
    evaluated = run()
    with torch.no_grad():
        without_grad = run()
    with torch.inference_mode():
        inferred = run()
    for other in (evaluated, without_grad, inferred):
        assert torch.allclose(other, trained, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens_give_no_output_and_zero_gradients(recipe, pad, dtype):
    size = 100 if pad else N
    model, plugin = converted(
        nn.Sequential(nn.Linear(size, size), nn.Linear(size, size)), recipe, pad=pad, weights_dtype=dtype
    )
    for shape in ((0, size), (2, 0, size)):
        model.zero_grad()
        x = plugin.convert_input(torch.empty(shape)).requires_grad_()
        with plugin.forward_context():
            y = model(x)
            y.float().sum().backward()
        assert y.shape == x.shape and x.grad.shape == x.shape
        assert all(not parameter.grad.any() for parameter in model.parameters())
        with torch.inference_mode(), plugin.forward_context():
            assert model(plugin.convert_input(torch.empty(shape))).shape == shape


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_penalty_through_the_rounding_is_refused(recipe):
    model, plugin = converted(nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N)), recipe)
    x = tokens(16, N).requires_grad_()
    with plugin.forward_context(), pytest.raises(RuntimeError, match=r"create_graph=True|once_differentiable"):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()


def test_gradient_penalty_beside_the_layers_that_it_leaves_out_is_exact():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))
    model, plugin = converted(
        copy.deepcopy(nn.ModuleDict({"critic": plain, "other": nn.Linear(N, N)})), "current", exclude=["critic"]
    )
    x = tokens(16, N)

    def penalty(critic):
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(critic(inputs).sum(), inputs, create_graph=True)
        grad.square().sum().backward()
        return [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]

    with plugin.forward_context():
        ours = penalty(model["critic"])
    assert all(torch.equal(a, b) for a, b in zip(ours, penalty(plain), strict=True))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(N, N), nn.GELU(), nn.Linear(N, N)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["current", "rowwise", "block", "mxfp8"])
def test_activation_checkpointing_changes_no_bit_of_the_gradients(recipe, dtype):
    gradients = {}
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model, plugin = converted(Checkpointed(reentrant), recipe, weights_dtype=dtype)
        x = plugin.convert_input(tokens(32, N)).requires_grad_()
        with plugin.forward_context():
            loss = model(x).float().square().mean()
        plugin.backward(loss, None)
        gradients[reentrant] = [parameter.grad for parameter in model.parameters()]
    for reentrant in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(gradients[reentrant], gradients[None], strict=True))


@pytest.mark.parametrize("recipe", ["current", "mxfp8"])
def test_hugging_faces_gradient_checkpointing_changes_no_bit(recipe):
    transformers = pytest.importorskip("transformers")
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        model, plugin = converted(transformers.LlamaForCausalLM(config).train(), recipe, exclude=["lm_head"])
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
        with plugin.forward_context():
            loss = model(input_ids=inputs, labels=inputs).loss
        plugin.backward(loss, None)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
