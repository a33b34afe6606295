import pytest
import torch
from torch.nn import functional as F

from modeling_bwr_dnc.token_loss import summed_cross_entropy


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
@pytest.mark.parametrize("keeps_logits", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(problem, chunk_length, keeps_logits):
    hidden, weight, labels = problem
    plain_logits = hidden @ weight.T
    plain = F.cross_entropy(plain_logits.flatten(0, 1), labels.flatten(), reduction="sum")
    chunked, logits = summed_cross_entropy(hidden, weight, labels, chunk_length, keeps_logits)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    wholes = [(3.0 * plain, 3.0 * chunked)]
    if keeps_logits:
        torch.testing.assert_close(logits, plain_logits, rtol=1e-12, atol=1e-12)
        # As distillation does, on top of the loss or alone.
        wholes += [(plain + plain_logits.sin().sum(), chunked + logits.sin().sum())]
        wholes += [(plain_logits.sin().sum(), logits.sin().sum())]
    for expected, found in wholes:
        expected = torch.autograd.grad(expected, (hidden, weight), retain_graph=True)
        found = torch.autograd.grad(found, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keeps_logits", [False, True])
def test_weights_of_labels(problem, keeps_logits):
    hidden, weight, labels = problem
    label_weights = torch.rand(2, 11, dtype=torch.float64)
    label_weights[1, 2] = 0.0
    losses = F.cross_entropy((hidden @ weight.T).transpose(1, 2), labels, reduction="none")
    plain = (losses * label_weights).sum()
    chunked, _ = summed_cross_entropy(hidden, weight, labels, 4, keeps_logits, label_weights)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(loss, (hidden, weight)) for loss in (chunked, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_weights_may_be_more_precise_than_the_model(problem):
    hidden, weight, labels = problem
    label_weights = torch.rand(2, 11, dtype=torch.float64)
    low, _ = summed_cross_entropy(hidden.float(), weight.float(), labels, 4, label_weights=label_weights)
    high, _ = summed_cross_entropy(hidden, weight, labels, 4, label_weights=label_weights)
    low.backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high)


def test_nothing_is_kept_without_gradients(problem):
    hidden, weight, labels = problem
    with torch.no_grad():
        loss, _ = summed_cross_entropy(hidden, weight, labels, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, summed_cross_entropy(hidden, weight, labels, 4)[0].detach())


def test_only_what_needs_a_gradient_gets_one(problem):
    hidden, weight, labels = problem
    loss, _ = summed_cross_entropy(hidden, weight.detach(), labels, 4)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_logits_never_exist_as_a_whole(problem):
    hidden, weight, labels = problem
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and result.shape[-1] == 17:
                largest = max(largest, result.numel())
            return result

    with Watch():
        summed_cross_entropy(hidden, weight, labels, 4)[0].backward()
    assert 0 < largest <= 4 * 17


def test_autocast_computes_the_softmax_in_float32(problem):
    hidden, weight, labels = (tensor.detach() for tensor in problem)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = summed_cross_entropy(hidden, weight, labels, 4)
    loss.backward()
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_that_is_no_token_is_an_error_and_not_another_token(label):
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
        summed_cross_entropy(torch.randn(3, 4), torch.randn(11, 4), torch.tensor([2, label, -100]))


def test_labels_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"of \[1, 10\] tokens, but the labels of \[1, 8\]"):
        summed_cross_entropy(torch.randn(1, 10, 4), torch.randn(6, 4), torch.zeros(1, 8, dtype=torch.int64))


def test_the_gradient_of_a_float16_head_is_as_large_as_the_loss_scale_makes_it():
    """8,192 tokens of one label, whose hidden states all point one way: their sum is beyond float16, their mean is not."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8192, 8, generator=generator) * 3 + 12
    weight = (torch.randn(50, 8, generator=generator) * 0.02).requires_grad_()
    labels = torch.full((8192,), 3)
    F.cross_entropy(hidden @ weight.T, labels).backward()
    expected, weight.grad = weight.grad, None
    with torch.autocast("cpu", torch.float16):
        total, _ = summed_cross_entropy(hidden, weight, labels)
    (total / len(labels) * 1024).backward()
    torch.testing.assert_close(weight.grad / 1024, expected, rtol=5e-3, atol=1e-3)
