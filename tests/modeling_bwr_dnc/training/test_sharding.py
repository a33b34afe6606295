"""Sharded parameters (FSDP2) over gloo: the launcher would fall back to DDP on a CPU without a word, so this goes below it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling_bwr_dnc.training.memory_metrics import GateMovement
from modeling_bwr_dnc.training.spans import read_in_spans
from tests.modeling_bwr_dnc.builders import VOCABULARY, tiny_config, tiny_model

STEPS = 2


def batches():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (STEPS, 2, 60), generator=generator)


def take_steps(model, rows_of_step):
    """Losses of some steps in detached spans; every process takes its own rows, gradients are averaged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for rows in rows_of_step:
        optimizer.zero_grad()
        total = 0.0
        for loss, cache in read_in_spans(model, {"input_ids": rows, "labels": rows}, 16, 8):
            loss = loss / (rows.shape[0] * (rows.shape[1] - 1))
            loss.backward()
            cache.detach()
            total += loss.item()
        optimizer.step()
        found.append(total)
    return found


def run_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_model(tiny_config()).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    movement = GateMovement(model)
    losses = take_steps(model, [batch[rank : rank + 1] for batch in batches()])
    assert movement.metrics()["memory/salience_moved"] > 0
    gathered = [None, None]
    dist.all_gather_object(gathered, losses)
    embedding = model.model.embed_tokens.weight.full_tensor()
    if rank == 0:
        torch.save((gathered, embedding.detach()), os.path.join(folder, "sharded.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_processes_have_the_losses_and_weights_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, args=(port, str(tmp_path)), nprocs=2)
    gathered, embedding = torch.load(tmp_path / "sharded.pt")
    model = tiny_model(tiny_config()).train()
    expected = take_steps(model, batches())
    assert [sum(pair) / 2 for pair in zip(*gathered, strict=True)] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(embedding, model.model.embed_tokens.weight.detach(), rtol=1e-9, atol=1e-9)
