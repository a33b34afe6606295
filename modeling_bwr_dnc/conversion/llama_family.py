"""Llama, Mistral, Qwen2, Qwen3 and SmolLM2 checkpoints as BWR-DNC models.

The two architectures share every tensor name; what differs is which biases and norms exist, and that BWR-DNC adds memory
parameters (their names contain ".memory."), which start neutral. So a conversion translates the config, moves the tensors
by name, and then *measures* that nothing changed: up to `config.lossless_length` tokens the converted model must give the
logits of its source's full attention.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_bwr_dnc.configuration_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc.memory_parameters import is_memory_parameter
from modeling_bwr_dnc.modeling_bwr_dnc import BwrDncForCausalLM
from modeling_bwr_dnc.state_bank import StateBankCache

LAYER_KINDS = {"bank": "state_bank_attention", "window": "sink_window_attention"}

# Largest logit difference that counts as equal. Transformers' Llama norms and angles stay in float32 in a float64 model.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-4}

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _llama_biases(config: PreTrainedConfig) -> dict:
    return {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": getattr(config, "mlp_bias", False),
    }


# What each source architecture has beside the shared fields.
_LAYOUTS = {
    "llama": _llama_biases,
    "mistral": lambda config: {},
    "qwen2": lambda config: {"attention_bias": True},
    "qwen3": lambda config: {**_llama_biases(config), "use_qk_norm": True},
    "smollm3": _llama_biases,
}


@dataclass
class EqualityProof:
    """What the comparison with the source's full attention measured.

    Attributes:
        max_difference: largest absolute difference between two logits, over all positions and rows.
        max_logit: largest absolute logit of the source, the scale of that difference.
        length: tokens per row.
        rows: what the rows held, "random tokens" or "text".
        dtype: type in which both models computed.
    """

    max_difference: float
    max_logit: float
    length: int
    rows: tuple[str, ...]
    dtype: str

    def __str__(self) -> str:
        return (
            f"largest logit difference to the source's full attention: {self.max_difference:.2e} "
            f"(logits up to {self.max_logit:.1f}; {' and '.join(self.rows)}, {self.length:,} tokens each, {self.dtype})"
        )


def parse_layer_types(pattern: str, num_hidden_layers: int) -> list[str]:
    """`"window,window,bank"` repeated over the layers: `["sink_window_attention", ..., "state_bank_attention", ...]`.

    Raises:
        ValueError: if the pattern holds anything but the words "bank" and "window".
    """
    words = [word.strip() for word in pattern.split(",")]
    unknown = [word for word in words if word not in LAYER_KINDS]
    if unknown:
        raise ValueError(
            f"layer types {pattern!r} hold {unknown[0]!r}; use the words {', '.join(LAYER_KINDS)}, comma-separated"
        )
    return [LAYER_KINDS[words[index % len(words)]] for index in range(num_hidden_layers)]


def source_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the source's most short-sighted layer can see, or `None` when every layer sees all of them."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return window


# Slots of a converted model, all raw: levels without a trained compressor predict text within 0.4% of what as many raw slots do,
# and are lossless for fewer tokens (model_cards/results/smollm2_memory_cpu_202611.md).
RAW_SLOTS = 768


def converted_config(
    source: PreTrainedConfig,
    segment_length: int | None = None,
    num_sink_tokens: int | None = None,
    memory_slots: list[int] | None = None,
    layer_types: str | None = None,
    allow_sliding_window: bool = False,
    slot_shares: list[float] | None = None,
) -> BwrDncConfig:
    """The BWR-DNC config that computes what `source` computes, until the bank overflows.

    Args:
        segment_length, num_sink_tokens: `None` takes the default of `BwrDncConfig`.
        memory_slots: `None` makes `RAW_SLOTS` raw ones, or less to fit the trained positions.
        layer_types: pattern of "bank" and "window", repeated over the layers; `None` makes every layer a bank layer.
        allow_sliding_window: convert a source whose own sliding window is shorter than `lossless_length`; the result
            sees more than its source does and equals it only within that window.
        slot_shares: see `BwrDncConfig`.

    Raises:
        ValueError: if the architecture or one of its settings has no equal in BWR-DNC.
    """
    _refuse_unequal(source)
    budget = {
        "segment_length": segment_length,
        "num_sink_tokens": num_sink_tokens,
        "memory_slots": memory_slots,
        "slot_shares": slot_shares,
    }
    fields = {name: getattr(source, name) for name in _SHARED_FIELDS}
    fields |= _LAYOUTS[source.model_type](source)
    fields |= {name: value for name, value in budget.items() if value is not None}
    fields["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    if layer_types is not None:
        fields["layer_types"] = parse_layer_types(layer_types, source.num_hidden_layers)
    config = BwrDncConfig(**fields)
    if memory_slots is None:
        room = config.max_position_embeddings - config.num_sink_tokens - 2 * config.segment_length
        config.memory_slots = [max(0, min(RAW_SLOTS, room)), 0, 0]

    window = source_window(source)
    if window is not None and window < config.lossless_length and not allow_sliding_window:
        raise ValueError(
            f"the source sees only a sliding window of {window} tokens, while the converted model would see all "
            f"{config.lossless_length} tokens before its bank is full; the two cannot be equal. Give fewer raw slots or a "
            "shorter segment, or allow it (--allow-sliding-window): equality is then tested within that window only"
        )
    return config


def _refuse_unequal(source: PreTrainedConfig) -> None:
    """Raises `ValueError` for an architecture, or layers without rotary positions, that have no equal in BWR-DNC."""
    if source.model_type not in _LAYOUTS:
        raise ValueError(f"{source.model_type!r} is not convertible; convertible are {', '.join(_LAYOUTS)}")
    without_rope = [
        index for index, has_rope in enumerate(getattr(source, "no_rope_layers", None) or []) if not has_rope
    ]
    if without_rope:
        raise ValueError(
            f"the source's layer {without_rope[0]} (of {len(without_rope)}) uses no rotary positions; BWR-DNC has no such layer"
        )


def transfer_weights(source: PreTrainedModel, config: BwrDncConfig) -> BwrDncForCausalLM:
    """A BWR-DNC model that shares the source's tensors; its memory parameters are neutral.

    Raises:
        ValueError: if a source tensor has no place, has another shape, or a place stays empty; it names the tensor.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    weights, places = source.state_dict(), model.state_dict()
    for name, tensor in weights.items():
        if name not in places:
            raise ValueError(
                f"the source tensor {name!r} has no place in the converted model; converting would lose it"
            )
        if tensor.shape != places[name].shape:
            raise ValueError(
                f"the source tensor {name!r} has shape {tuple(tensor.shape)}, its place {tuple(places[name].shape)}"
            )
    unfilled = [name for name in places if name not in weights and not is_memory_parameter(name)]
    if unfilled:
        raise ValueError(f"no source tensor fills {unfilled[0]!r}; it would start out random")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    # The memory is the model's own cache, whichever the source asks for.
    model.generation_config.cache_implementation = None
    return model.eval()


def prove_equality(
    source: PreTrainedModel,
    model: BwrDncForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
) -> EqualityProof:
    """Compare all logits of both models on random tokens, and on `text` when a tokenizer is given that has tokens for it.

    The length is `config.lossless_length`, or the source's sliding window if that is shorter. A difference above the
    float32 tolerance is measured again in float64, and only that counts.

    Raises:
        ValueError: if the models differ.
    """
    length = min(model.config.lossless_length, source_window(source.config) or model.config.lossless_length)
    generator = torch.Generator().manual_seed(0)
    rows = {"random tokens": torch.randint(source.config.vocab_size, (1, length), generator=generator)}
    if tokenizer is not None and text is not None:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]
        if ids.shape[1] > 0:
            rows["text"] = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]

    for dtype in (torch.float32, torch.float64):
        with _weights_cast(source, dtype), _weights_cast(model, dtype):
            differences, sizes = zip(*(_compare(source, model, ids) for ids in rows.values()))
        proof = EqualityProof(max(differences), max(sizes), length, tuple(rows), str(dtype).removeprefix("torch."))
        if proof.max_difference <= TOLERANCE[dtype]:
            return proof
    raise ValueError(f"the converted model does not equal its source: {proof}")


@torch.no_grad()
def _compare(source: PreTrainedModel, model: BwrDncForCausalLM, ids: torch.Tensor) -> tuple[float, float]:
    """Largest logit difference and largest logit of one row, `ids` [1, T].

    The converted model reads it twice: in one pass, and through a cache, in blocks that do not end where segments do.
    Logits are made for 256 positions at a time, since a large vocabulary at every position would fill the memory.
    """
    ids = ids.to(source.device)
    expected = source.base_model(ids, use_cache=False).last_hidden_state
    cache, blocks = StateBankCache(config=model.config), ids.split(model.config.segment_length // 2 + 3, dim=1)
    readings = [
        model.base_model(ids, use_cache=False).last_hidden_state,
        torch.cat([model.base_model(block, past_key_values=cache).last_hidden_state for block in blocks], dim=1),
    ]
    difference = size = 0.0
    for actual in readings:
        for expected_part, actual_part in zip(expected.split(256, dim=1), actual.split(256, dim=1)):
            expected_logits = source.get_output_embeddings()(expected_part)
            actual_logits = model.get_output_embeddings()(actual_part)
            difference = max(difference, (expected_logits - actual_logits).abs().max().item())
            size = max(size, expected_logits.abs().max().item())
    return difference, size


@contextmanager
def _weights_cast(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """With parameters of another type, which alone change: `model.to` would also round the rotary frequencies."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
