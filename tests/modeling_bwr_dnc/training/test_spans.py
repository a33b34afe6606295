import pytest
import torch
from torch.nn import functional as F

from modeling_bwr_dnc.training.spans import read_in_spans, shift_labels
from tests.modeling_bwr_dnc.builders import VOCABULARY, tiny_config, tiny_model


@pytest.fixture(scope="module")
def batch():
    """Two rows whose banks overflow: one of two packed documents, one padded; some labels are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (2, 90), generator=generator)
    labels, mask, positions = ids.clone(), torch.ones_like(ids), torch.arange(90).repeat(2, 1)
    labels[0, 5:20] = -100
    positions[0, 37:] -= 37
    mask[1, 70:], labels[1, 70:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config()).train()


@pytest.fixture(scope="module")
def ordinary(model, batch):
    """Loss (a sum) and gradients of one pass over the whole sequence, from its logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("span_length", [4, 13, 30, 90, None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_detaching_spans_equal_one_pass_with_gradients(model, batch, ordinary, span_length, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({})
    else:
        model.gradient_checkpointing_disable()
    loss = sum(loss for loss, _ in read_in_spans(model, batch, span_length, 7))
    torch.testing.assert_close(loss.detach(), ordinary[0], rtol=1e-9, atol=1e-9)
    found = gradients(model, loss)
    torch.testing.assert_close(found, ordinary[1], rtol=1e-9, atol=1e-9)


def test_detaching_keeps_the_loss_and_cuts_the_gradient(model, batch, ordinary):
    model.gradient_checkpointing_disable()
    model.zero_grad()
    total = 0.0
    for loss, cache in read_in_spans(model, batch, 30, 7):
        loss.backward()
        cache.detach()
        total = total + loss.detach()
    torch.testing.assert_close(total, ordinary[0], rtol=1e-9, atol=1e-9)
    embedding = model.model.embed_tokens.weight.grad
    assert not torch.allclose(embedding, ordinary[1]["model.embed_tokens.weight"], rtol=1e-3)


@pytest.mark.parametrize("span_length", [13, None])
def test_labels_count_by_their_weights(model, batch, span_length):
    weights = torch.rand(batch["labels"].shape, dtype=torch.float64)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses = F.cross_entropy(model(**inputs).logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    weighted = batch | {"label_weights": weights}
    found = sum(loss for loss, _ in read_in_spans(model, weighted, span_length, 7))
    torch.testing.assert_close(found, (losses * weights[:, 1:]).sum(), rtol=1e-9, atol=1e-9)


def test_a_target_is_the_label_of_the_next_token():
    labels = torch.tensor([[1, 2, -100, 4]])
    assert shift_labels(labels).tolist() == [[2, -100, 4, -100]]
