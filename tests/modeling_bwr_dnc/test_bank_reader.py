import pytest
import torch
from builders import overflowing_length, read, tiny_config, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_bwr_dnc import modeling_bwr_dnc, planned_reader
from modeling_bwr_dnc.memory_ops import take_entries
from modeling_bwr_dnc.planned_reader import SharedGather


def test_gathers_with_a_shared_gradient_are_plain_gathers():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(2, 3, 9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    indices = [torch.randint(9, (2, 3, count), generator=generator) for count in (5, 7, 1)]

    def loss(take):
        return sum((take(index).sin() * weight).sum() for weight, index in enumerate(indices, start=1))

    (expected,) = torch.autograd.grad(loss(lambda index: take_entries(tensor, index)), tensor)
    shared = loss(SharedGather(tensor * 1.0))
    for keeps_graph in (True, False):
        (found,) = torch.autograd.grad(shared, tensor, retain_graph=keeps_graph)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class CountElements(TorchDispatchMode):
    """Counts the elements of everything that operations return, or add into a part of."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func in (torch.ops.aten.scatter_add_.default, torch.ops.aten.index_add_.default):
            # In place: what counts is what is added.
            self.total += args[3].numel()
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.total += tensor.numel()
        return result


@pytest.mark.parametrize("layer_type", ["sink_window_attention", "state_bank_attention"])
def test_a_training_step_costs_the_same_for_every_further_token(layer_type, monkeypatch):
    monkeypatch.setattr(planned_reader, "READ_TOGETHER", 1)
    config = tiny_config(num_hidden_layers=1, layer_types=[layer_type])
    # As many tokens in every chunk of the loss, at all lengths.
    monkeypatch.setattr(modeling_bwr_dnc, "LOSS_CHUNK", config.segment_length)
    model = tiny_model(config).train()
    start, further, costs = overflowing_length(config, rest=0), 48 * config.segment_length, []
    for length in (start, start + further, start + 2 * further):
        with CountElements() as counter:
            model(token_ids(length), labels=token_ids(length), use_cache=False).loss.backward()
        costs.append(counter.total)
    first, second = costs[1] - costs[0], costs[2] - costs[1]
    assert abs(second / first - 1) < 0.01


def test_training_and_decoding_compile_without_graph_breaks():
    config = tiny_config(num_hidden_layers=2, layer_types=["sink_window_attention", "state_bank_attention"])
    model, length = tiny_model(config), 6 * config.segment_length + 1
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    ids = token_ids(length + 2)
    found = []
    for call in (model, compiled):
        logits = call(ids, use_cache=False).logits
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        _, cache = read(model, ids[:, :-2])
        with torch.no_grad():
            decoded = [call(ids[:, i : i + 1], past_key_values=cache).logits for i in (length, length + 1)]
        found.append([logits, *gradients, *decoded])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("leaves_consolidation", "most"), [(False, 5), (True, 3)])
def test_decoding_compiles_a_few_times_and_not_for_every_position(leaves_consolidation, most):
    """With dynamic shapes: a token, one whose query is stored, one after a consolidation (if not left to the model); over three of them."""
    config = tiny_config(num_hidden_layers=2, layer_types=["sink_window_attention", "state_bank_attention"])
    model, length = tiny_model(config), 6 * config.segment_length + 1
    graphs, num_left = [], 0

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    ids = token_ids(length + 3 * config.segment_length)
    expected, _ = read(model, ids)
    _, cache = read(model, ids[:, :length])
    found = []
    with torch.no_grad():
        for i in range(length, ids.shape[1]):
            is_left = leaves_consolidation and cache.consolidates_next
            num_left += is_left
            found.append((model if is_left else compiled)(ids[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, length:], rtol=1e-9, atol=1e-9)
    assert len(graphs) <= most
    assert num_left == (3 if leaves_consolidation else 0)


def test_attention_of_a_token_is_shown_while_the_longest_row_waits():
    model, ids = tiny_model(tiny_config(memory_slots=[20, 0, 0])), token_ids(10)
    short = ids.masked_fill(torch.arange(10) < 3, 0)
    _, cache = read(model, torch.cat((ids, short)), attention_mask=torch.stack((ids[0], short[0])) != 0)
    mask = torch.cat((torch.stack((ids[0], short[0])) != 0, torch.tensor([[False], [True]])), dim=1)
    _, alone = read(model, ids[:, 3:])
    with torch.no_grad():
        found = model(ids[:, :1].repeat(2, 1), attention_mask=mask, past_key_values=cache, output_attentions=True)
        expected = model(ids[:, :1], past_key_values=alone, output_attentions=True)
    torch.testing.assert_close(found.logits[1:], expected.logits, rtol=1e-9, atol=1e-9)
    for shown, wanted in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(shown[1:, ..., 3:], wanted, rtol=1e-9, atol=1e-9)
        assert not shown[1, ..., :3].any()
