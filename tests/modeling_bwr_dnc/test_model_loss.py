import pytest
import torch
from builders import random_model, token_ids
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def problem():
    """A float64 model, ids [1, 30] and labels of which some are ignored."""
    ids = token_ids(30)
    labels = ids.clone()
    labels[0, 5:9] = -100
    return random_model(3), ids, labels


def assert_same_gradients(model, first, second):
    """Two losses have the same value and the same gradients."""
    found = []
    for loss in (first, second):
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append([gradient for gradient in gradients if gradient is not None])
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_own_loss_is_the_mean_cross_entropy_of_the_next_tokens(problem, skip_logits):
    model, ids, labels = problem
    output = model(ids, labels=labels, skip_logits=skip_logits)
    logits = model(ids).logits
    assert_same_gradients(model, output.loss, F.cross_entropy(logits[0, :-1], labels[0, 1:]))
    if skip_logits:
        assert output.logits is None
    else:
        torch.testing.assert_close(output.logits, logits, rtol=1e-12, atol=1e-12)


def test_logits_beside_the_loss_carry_gradients_of_their_own(problem):
    model, ids, labels = problem
    output, logits = model(ids, labels=labels), model(ids).logits
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:]) + logits.square().mean()
    assert_same_gradients(model, output.loss + output.logits.square().mean(), expected)


def test_a_wrapped_head_and_another_loss_are_respected(problem):
    model, ids, labels = problem
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    logits = model(ids).logits
    assert logits.abs().max() <= 1
    # The library computes this loss in float32.
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(model(ids, labels=labels).loss.double(), expected, rtol=1e-5, atol=1e-5)
    model.loss_function = lambda logits, labels, **options: logits.sum()
    torch.testing.assert_close(model(ids, labels=labels).loss, logits.sum())


def test_a_sum_over_many_batches_is_divided_by_their_tokens(problem):
    model, ids, labels = problem
    count = (labels[:, 1:] != -100).sum()
    mean, share = (model(ids, labels=labels, num_items_in_batch=number).loss for number in (None, 3 * count))
    torch.testing.assert_close(share, mean / 3, rtol=1e-12, atol=1e-12)


def test_skip_logits_without_labels_is_refused(problem):
    model, ids, _ = problem
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, skip_logits=True)


@pytest.mark.parametrize("own_loss", [True, False])
def test_second_derivatives_are_refused_and_not_wrong(problem, own_loss):
    model, ids, labels = problem
    loss = model(ids, labels=labels).loss if own_loss else model(ids).logits.square().sum()
    with pytest.raises(RuntimeError, match="create_graph|once_differentiable"):
        first = torch.autograd.grad(loss, model.get_input_embeddings().weight, create_graph=True)
        first[0].square().sum().backward()
