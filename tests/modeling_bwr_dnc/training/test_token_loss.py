import pytest
import torch
from torch.nn import functional as F

from modeling_bwr_dnc.token_loss import linear_cross_entropy
from modeling_bwr_dnc.training.token_loss import head_gives_losses


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    hidden = torch.randn(2, 11, 8, **options).requires_grad_()
    weight = torch.randn(17, 8, **options).requires_grad_()
    labels = torch.randint(0, 17, (2, 11), generator=generator)
    labels[0, 3:6] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_length", [1, 4, 22, 100])
def test_loss_and_gradients_equal_the_plain_ones(problem, chunk_length):
    hidden, weight, labels = problem
    factors = torch.linspace(0.5, 2, labels.numel(), dtype=torch.float64).view_as(labels)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    expected = torch.autograd.grad((plain * factors).sum(), (hidden, weight))
    chunked = linear_cross_entropy(hidden, weight, labels, chunk_length)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((chunked * factors).sum(), (hidden, weight))
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one(problem):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden, weight.detach(), labels, 4).sum()
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_logits_never_exist_as_a_whole(problem):
    hidden, weight, labels = problem
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default and result.shape[-1] == 17:
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, labels, 4).sum().backward()
    assert 0 < largest <= 4 * 17


def test_autocast_computes_the_softmax_in_float32(problem):
    hidden, weight, labels = (tensor.detach() for tensor in problem)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 4)
    loss.sum().backward()
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0.05)


def test_the_head_is_itself_again_afterwards():
    head = torch.nn.Linear(8, 17, bias=False)
    hidden, labels = torch.randn(1, 3, 8), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError), head_gives_losses(head, labels, 2):
        assert head(hidden).shape == (1, 3)
        raise RuntimeError
    assert head(hidden).shape == (1, 3, 17)
