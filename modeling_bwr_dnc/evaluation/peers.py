"""The models that a benchmark puts beside each other, all of one shape, and what each must at least compute and read.

Shapes: `P` positions, `S` segment length.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from modeling_bwr_dnc import BwrDncConfig, BwrDncForCausalLM
from modeling_bwr_dnc.linear import linear

# Tokens that peers are given at a time, where they are not given a whole prompt.
READ_BLOCK_LENGTH = 1024
# Positions that the peers are declared for; BWR-DNC's own never grow with the length.
PEER_POSITIONS = 1 << 18


@dataclass(frozen=True)
class Peer:
    """
    One kind of model.

    Attributes:
        build: a new model of the shape of a `BwrDncConfig`.
        visible_keys: keys that the query at each of P positions reads, over all layers, [P]; None for a recurrent model.
        read_block_length: a prompt is given in blocks of so many tokens when it is timed (None: in one call).
        longest_training: tokens of a training step above which its memory is out of proportion (None: no limit).
        has_lazy_end: its last layer computes outputs for the tokens alone whose logits are wanted.
        is_default: measured unless other models are named.
    """

    name: str
    build: Callable[[BwrDncConfig], PreTrainedModel]
    visible_keys: Callable[[BwrDncConfig, int], np.ndarray] | None
    read_block_length: int | None = None
    longest_training: int | None = None
    has_lazy_end: bool = False
    is_default: bool = True


def shared_shape(config: BwrDncConfig) -> dict:
    """The fields that Llama and Mistral have in common with BWR-DNC."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
        "pad_token_id",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names} | {
        "max_position_embeddings": PEER_POSITIONS,
        "attn_implementation": "sdpa",
    }


def build_llama(config: BwrDncConfig) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**shared_shape(config)))


def build_llama_onednn(config: BwrDncConfig) -> PreTrainedModel:
    """Llama, its linear layers computed as BWR-DNC's are: what is left of a difference is not a matter of the library."""
    model = build_llama(config)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(linear, weight=module.weight, bias=module.bias)
    return model


def build_sliding_window(config: BwrDncConfig) -> PreTrainedModel:
    """Mistral with the widest window that a query of BWR-DNC has, two segments."""
    return MistralForCausalLM(MistralConfig(**shared_shape(config), sliding_window=2 * config.segment_length))


def build_mamba2(config: BwrDncConfig) -> PreTrainedModel:
    """Mamba2 of the same width, with as many layers as make its parameters most nearly equal in number."""

    def of_depth(num_layers: int) -> Mamba2Config:
        return Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=num_layers,
            num_heads=2 * config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            expand=2,
            n_groups=1,
            chunk_size=64,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    with torch.device("meta"):
        one, two = (Mamba2ForCausalLM(of_depth(depth)).num_parameters() for depth in (1, 2))
        target = BwrDncForCausalLM(config).num_parameters()
    return Mamba2ForCausalLM(of_depth(max(round(1 + (target - one) / (two - one)), 1)))


def prefix_lengths(config: BwrDncConfig, layer_idx: int, num_segments: int) -> list[int]:
    """Entries before the window (sinks and slots) that each of a sequence's first segments sees in a layer."""
    length, capacity = config.segment_length, config.layer_slots(layer_idx) if config.use_memory else (0, 0, 0)
    sinks, counts, lengths = 0, [0, 0, 0], []
    for segment in range(num_segments):
        if segment >= 2:
            before, sinks = sinks, min(config.num_sink_tokens, (segment - 1) * length)
            counts[0] += length - (sinks - before)
            for level in range(3):
                excess = max(counts[level] - capacity[level], 0)
                counts[level] -= excess
                if level < 2 and capacity[level + 1]:
                    counts[level + 1] += -(-excess // 2)
        lengths.append(sinks + sum(counts))
    return lengths


def visible_to_bwr_dnc(config: BwrDncConfig, num_positions: int) -> np.ndarray:
    """See `Peer.visible_keys`."""
    length, positions = config.segment_length, np.arange(num_positions)
    segment = positions // length
    in_window = positions - np.maximum(segment - 1, 0) * length + 1
    total = np.zeros(num_positions, dtype=np.int64)
    for layer_idx in range(len(config.layer_types)):
        prefix = np.array(prefix_lengths(config, layer_idx, -(-num_positions // length)), dtype=np.int64)
        total += prefix[segment] + in_window
    return total


def visible_to_llama(config: BwrDncConfig, num_positions: int) -> np.ndarray:
    return config.num_hidden_layers * (np.arange(num_positions) + 1)


def visible_to_sliding_window(config: BwrDncConfig, num_positions: int) -> np.ndarray:
    return config.num_hidden_layers * np.minimum(np.arange(num_positions) + 1, 2 * config.segment_length)


OURS, FULL = "bwr-dnc", "llama"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, BwrDncForCausalLM, visible_to_bwr_dnc, has_lazy_end=True),
        Peer(FULL, build_llama, visible_to_llama),
        Peer("llama-onednn", build_llama_onednn, visible_to_llama, is_default=False),
        # In one call its mask alone would be as large as the square of the length.
        Peer("sliding-window", build_sliding_window, visible_to_sliding_window, read_block_length=READ_BLOCK_LENGTH),
        # A step of 8,192 tokens at 120 million parameters, beside the other models, did not fit into 24 GB: without its CUDA
        # kernels Transformers spreads out the products of every chunk.
        Peer("mamba2", build_mamba2, None, read_block_length=READ_BLOCK_LENGTH, longest_training=4096),
    )
}
DEFAULT_PEERS = tuple(name for name, peer in PEERS.items() if peer.is_default)


# ---------------------------------------------------------------------------------------------------------------------
# What each must compute and read
# ---------------------------------------------------------------------------------------------------------------------


def forward_flops(peer: Peer, model: PreTrainedModel, config: BwrDncConfig, num_tokens: int, num_logits: int) -> float:
    """
    Floating point operations of reading one sequence, with logits of `num_logits` of its tokens.

    Counted are linear layers and, over visible keys only, attention. Not counted: the memory's own small projections, usage
    and consolidation, the scan of a recurrent model, all elementwise work, and anything computed twice.
    """
    head = model.get_output_embeddings()

    def weights_of(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear) and m is not head)

    flops = 2.0 * weights_of(model) * num_tokens + 2.0 * head.weight.numel() * num_logits
    if peer.has_lazy_end and num_logits < num_tokens:
        last = model.get_decoder().layers[-1]
        flops -= 2.0 * (weights_of(last.mlp) + weights_of(last.self_attn.o_proj)) * (num_tokens - num_logits)
        config = copy.copy(config)
        config.layer_types = config.layer_types[:-1]
    if peer.visible_keys is not None:
        pairs = float(peer.visible_keys(config, num_tokens).sum())
        flops += 4.0 * config.num_attention_heads * config.head_dim * pairs
    return flops


def decoded_token_bytes(
    peer: Peer, model: PreTrainedModel, config: BwrDncConfig, num_before: int, batch_size: int, cache_bytes: int
) -> float:
    """
    Bytes that the token at position `num_before` must read at least: each weight once, and visible keys and values once (a
    recurrent model: its state).
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        weights -= embedding.nbytes
    if peer.visible_keys is None:
        return weights + cache_bytes
    visible = int(peer.visible_keys(config, num_before + 1)[-1])
    itemsize = model.get_output_embeddings().weight.element_size()
    return weights + 2.0 * batch_size * config.num_key_value_heads * config.head_dim * visible * itemsize


def plain_cache_nbytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Bytes of a growing cache with the keys and values of `num_tokens` tokens of one row, and nothing else."""
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_tokens * per_token * model.get_output_embeddings().weight.element_size()


def cache_nbytes(cache) -> int:
    """Bytes of every tensor that a cache holds, each storage once. Of a view, what it shows: the next token copies that alone."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    storages: dict[int, int] = {}

    def walk(value) -> None:
        if isinstance(value, torch.Tensor):
            place, size = value.untyped_storage().data_ptr(), min(value.nbytes, value.untyped_storage().nbytes())
            storages[place] = max(storages.get(place, 0), size)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    for layer in cache.layers:
        walk(vars(layer))
    return sum(storages.values())
