"""A step recorded as a CUDA graph needs a CUDA device (`scripts.cuda_smoke` compares it there); what it rests on holds anywhere."""

import pytest
import torch

from modeling_bwr_dnc.training import CapturedStep
from tests.modeling_bwr_dnc.builders import VOCABULARY, tiny_config, tiny_model

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def model():
    return tiny_model(tiny_config()).train()


def token_ids(length: int = 90) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


def test_a_seed_on_the_device_makes_the_same_noise(model):
    """Slots overflow, so that noise on the cut decides what is seen, and a seed that is a tensor can change after recording."""
    ids, seed = token_ids(), torch.tensor(0)
    losses = []
    for number in (3, 4, 2**31):
        seed.fill_(number)
        on_device = model(ids, labels=ids, use_cache=False, retention_noise_seed=seed).loss
        losses.append(model(ids, labels=ids, use_cache=False, retention_noise_seed=number).loss)
        assert on_device.equal(losses[-1])
    assert len({loss.item() for loss in losses}) == 3


def test_a_model_on_the_cpu_is_refused(model):
    ids = token_ids()
    with pytest.raises(ValueError, match="on 'cpu', but CUDA graphs need a CUDA device"):
        CapturedStep(model, {"input_ids": ids, "labels": ids})


@needs_cuda
def test_what_the_host_reads_is_refused(model):
    ids = token_ids().cuda()
    with pytest.raises(ValueError, match="takes input_ids and labels"):
        CapturedStep(model.cuda(), {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
