import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc import linear as linear_module
from modeling_bwr_dnc.linear import add_product, apply_linear, gated_linear, linear, linear_into
from modeling_bwr_dnc.modeling_bwr_dnc import BwrDncMLP

# Wide enough for oneDNN, whatever the number of rows.
IN, OUT = 512, 576

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def onednn(monkeypatch):
    """Products by oneDNN, whatever the processor; how many there were."""
    products = []

    def counted(*arguments):
        products.append(arguments)
        return compute(*arguments)

    compute = linear_module._onednn_linear
    monkeypatch.setattr(linear_module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(linear_module, "_onednn_linear", counted)
    return products


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (7, IN), (2, 5, IN)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_their_gradients_are_those_of_torch(onednn, shape, has_bias):
    given = tensors(shape, (OUT, IN), (OUT,))
    inputs, weight, bias = given
    found, expected = (function(inputs, weight, bias if has_bias else None) for function in (linear, F.linear))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    wanted = given if has_bias else given[:2]
    gradients = [torch.autograd.grad(output.sin().sum(), wanted) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    assert onednn


def with_weight(weight):
    module = nn.Linear(*weight.shape[::-1], bias=False)
    del module.weight
    module.weight = weight
    return module


def test_a_gated_product_and_its_gradients_are_those_of_torch(onednn):
    given = tensors((2, 5, IN), (2, 5, IN), (OUT, IN))
    gate, up, weight = given
    results = []
    for output in (gated_linear(with_weight(weight), gate, up), F.linear(F.silu(gate) * up, weight)):
        first = torch.autograd.grad(output.sin().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), given)
        results.append([tensor.detach() for tensor in (output, *first, *second)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-5 * expected.abs().max().item())
    weight.requires_grad_(False)
    gated_linear(with_weight(weight), gate, up).sum().backward()
    assert weight.grad is None and gate.grad.isfinite().all()


def test_a_training_step_computes_the_products_of_its_mlp_once(onednn):
    """3 forward, 2 backward for each; the gate is computed again, but no product."""
    mlp = BwrDncMLP(BwrDncConfig(hidden_size=IN, intermediate_size=OUT, num_attention_heads=4))
    mlp(torch.randn(1, 300, IN, requires_grad=True)).sum().backward()
    assert len(onednn) == 9


def test_tensors_that_are_not_dense_are_read_right(onednn):
    (wide,) = tensors((2, 6, 2 * IN))
    (weight,) = tensors((2 * OUT, IN))
    inputs, rows = wide[:, -1:, ::2], weight[::2]
    torch.testing.assert_close(linear(inputs, rows), F.linear(inputs, rows), rtol=1e-5, atol=1e-4)
    assert onednn


def test_gradients_can_be_differentiated_again(onednn):
    inputs, weight = tensors((3, IN), (OUT, IN))
    second = []
    for function in (linear, F.linear):
        (first,) = torch.autograd.grad(function(inputs, weight).square().sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*second, rtol=1e-3, atol=1.0)  # of numbers around 1e5
    assert onednn


def test_products_into_given_tensors_are_those_of_torch(onednn):
    left, right, weight = (tensor.detach() for tensor in tensors((300, 5000), (300, IN), (OUT, IN)))
    total = torch.ones(5000, IN)
    add_product(total, left, right)
    torch.testing.assert_close(total, 1 + left.T @ right, rtol=1e-4, atol=1e-3)
    out = torch.empty(300, OUT)
    assert linear_into(out, right, weight) is out
    torch.testing.assert_close(out, right @ weight.T, rtol=1e-5, atol=1e-4)
    assert onednn


def test_what_is_no_plain_linear_layer_is_called(onednn):
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    inputs, plain = torch.randn(2, IN), nn.Linear(IN, OUT)
    hooked, doubled = nn.Linear(IN, OUT), Doubled(IN, OUT)
    hooked.register_forward_hook(lambda module, arguments, output: output + 1)
    with torch.no_grad():
        for module in (hooked, doubled):
            assert torch.equal(apply_linear(module, inputs), module(inputs))
        assert not onednn
        torch.testing.assert_close(apply_linear(plain, inputs), plain(inputs), rtol=1e-5, atol=1e-5)
        assert onednn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(onednn, dtype):
    inputs, weight = tensors((2, IN), (OUT, IN), dtype=dtype)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(inputs.float(), weight.float()).dtype == torch.bfloat16
    assert not onednn
