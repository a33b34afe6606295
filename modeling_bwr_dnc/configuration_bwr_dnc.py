"""Configuration of BWR-DNC models."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import configuration_utils
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .peft_defaults import register_peft_defaults

LAYER_TYPES = ("state_bank_attention", "sink_window_attention")
MEMORY_POSITIONS = ("rank", "constant")
RETENTION_SCORES = (
    "salience",
    "attention",
    "expected_attention",
    "key_norm",
    "key_difference",
    "recency",
    "random",
)
# Kinds of RoPE whose angles do not change with the length read, since what was read before keeps its own, and the numbers they need.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# `Trainer` reads the config of a checkpoint as the base class when it resumes, which checks layer types by these lists.
for _name in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
    _known = getattr(configuration_utils, _name, ())
    setattr(configuration_utils, _name, tuple(dict.fromkeys((*_known, *LAYER_TYPES))))
AUTO_MAP = {
    "AutoConfig": "configuration_bwr_dnc.BwrDncConfig",
    "AutoModel": "modeling_bwr_dnc.BwrDncModel",
    "AutoModelForCausalLM": "modeling_bwr_dnc.BwrDncForCausalLM",
    "AutoModelForSequenceClassification": "modeling_bwr_dnc.BwrDncForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_bwr_dnc.BwrDncForTokenClassification",
}


def with_value_errors(cls: type) -> type:
    """A class after `@strict`, whose errors for values of a wrong type are no `ValueError`; here they are, with the reason alone."""
    strict_setattr = cls.__setattr__

    def __setattr__(self, name, value):
        try:
            strict_setattr(self, name, value)
        except StrictDataclassError as error:
            # The reason comes first, then every type that was tried.
            raise ValueError(str(error.__cause__ or error).partition(" Errors:")[0]) from error

    cls.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]
    return cls


@with_value_errors
@strict
class BwrDncConfig(PreTrainedConfig):
    r"""
    Configuration of a [`BwrDncForCausalLM`]: a Llama-style decoder whose layers read an exact local window and a bounded
    bank of memory slots.

    The usual fields mean what they mean in `LlamaConfig`. The following are specific to BWR-DNC. `segment_length`,
    `num_sink_tokens` and `memory_slots` are run-time settings, independent of the weights.

    Args:
        attention_bias, attention_output_bias (`bool`, defaults to `False`):
            Biases of the query, key and value projections, and of the output projection.
        use_qk_norm (`bool`, defaults to `False`):
            RMS normalisation of queries and keys per head, before RoPE (as in Qwen3).
        hidden_dropout (`float`, defaults to 0.0):
            Dropout on the residual branches, a probability. Attention probabilities are never dropped.
        layer_types (`list[str]`, *optional*):
            Per layer, `"state_bank_attention"` (sinks, memory slots and window; the default everywhere) or
            `"sink_window_attention"` (sinks and window only).
        segment_length (`int`, *optional*, defaults to 256, or less to fit `max_position_embeddings`):
            Tokens per segment. A query sees its own segment and the one before exactly.
        num_sink_tokens (`int`, defaults to 4):
            The first tokens of a sequence, which never leave.
        memory_slots (`list[int]`, *optional*, defaults to `[512, 256, 128]`, or less to fit `max_position_embeddings`):
            Slots of the raw, the 2x and the 4x compressed level, per layer and key/value head.
        slot_shares (`list[float]`, *optional*):
            How many times `memory_slots` each layer has, rounded; once everywhere by default. With a mean of 1 they cost what
            they do without. Those of a saved config fall where other `memory_slots` are given to `from_pretrained`.
        memory_position (`str`, defaults to `"rank"`):
            RoPE position of a slot: its rank in time (`"rank"`), or one position just before the window (`"constant"`).
        routing_thresholds (`list[float]`, defaults to `[0.5, 0.8]`):
            Complexity, in (0, 1), from which a query is meant to read levels 1 and 2.
        usage_weight (`float`, defaults to 1.0):
            Weight of the measured usage (in [0, 1]) beside the learned salience when slots are retained.
        salience_pooling (`int`, defaults to 1):
            Neighbouring tokens, an odd number, over which salience is averaged when slots are retained; 1 means none.
        salience_boost (`float`, defaults to 0.0):
            How often salience above 0 counts beside once when slots are retained.
        attention_boost (`float` or `list[float]` by layer, defaults to 0.0):
            Attention logit that salient slots gain, times the pressure (0 until the first token is dropped): none at a (pooled)
            salience of 0, rising to all of it at `salience_scale`. No gradient flows through it.
        salience_scale (`float`, defaults to 1.0):
            Salience from which a slot gains the whole `attention_boost`.
        recency_weight (`float`, defaults to 0.0):
            Retention that a slot has over one that is 1,024 tokens older: with it, all but the salient fade.
        retention_score (`str`, defaults to `"salience"`):
            What decides which entries stay: `"salience"` (learned salience + usage), or a training-free score:
            `"attention"`, `"expected_attention"`, `"key_norm"`, `"key_difference"`, `"recency"`, `"random"`.
        short_conv_kernel (`int`, defaults to 0):
            Taps of a depthwise causal convolution before the query, key and value projections; 0 means none.
        use_memory (`bool`, defaults to `True`):
            `False` reads sinks and window only, in every layer.
        use_secondary_salience (`bool`, defaults to `False`):
            A second salience head, which lifts tokens above others, but never above a salience of 0.
        use_salience, use_routing, use_hard_routing, use_learned_compressor (`bool`):
            Switches of the learned parts, for ablations. Hard routing masks levels below their threshold.
    """

    model_type = "bwr_dnc"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
    }

    vocab_size: int = 50000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    use_qk_norm: bool = False
    hidden_dropout: int | float = 0.0
    layer_types: list[str] | None = None
    segment_length: int | None = None
    num_sink_tokens: int = 4
    memory_slots: list[int] | tuple[int, ...] | None = None
    slot_shares: list[int | float] | tuple[int | float, ...] | None = None
    memory_position: str = "rank"
    routing_thresholds: list[float | int] | tuple[float | int, ...] = (0.5, 0.8)
    usage_weight: int | float = 1.0
    salience_pooling: int = 1
    salience_boost: int | float = 0.0
    attention_boost: int | float | list[int | float] | tuple[int | float, ...] = 0.0
    salience_scale: int | float = 1.0
    recency_weight: int | float = 0.0
    retention_score: str = "salience"
    short_conv_kernel: int = 0
    use_memory: bool = True
    use_secondary_salience: bool = False
    use_salience: bool = True
    use_routing: bool = True
    use_hard_routing: bool = False
    use_learned_compressor: bool = True

    def __post_init__(self, **kwargs):
        for historical, name in self.attribute_map.items():
            if historical in kwargs:
                setattr(self, name, kwargs.pop(historical))
        # The library keeps any key it does not know; a slip of the pen must not pass for one.
        names = [item.name for item in fields(self)]
        for key in kwargs:
            meant = get_close_matches(key, names, n=1, cutoff=0.9)
            if meant:
                raise ValueError(f"`{key}` is no setting of a BWR-DNC model; `{meant[0]}` is. Correct the name.")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.layer_types is None:
            self.layer_types = ["state_bank_attention"] * self.num_hidden_layers
        # Settings left open fit the trained positions: 256 and [512, 256, 128] from 2,048 positions on.
        if self.segment_length is None:
            self.segment_length = max(1, min(256, self.max_position_embeddings // 8))
        if self.memory_slots is None:
            room = self.max_position_embeddings - self.num_sink_tokens - 2 * self.segment_length
            unit = max(0, min(128, room // 7))
            self.memory_slots = [4 * unit, 2 * unit, unit]
        for name in ("memory_slots", "slot_shares", "routing_thresholds", "attention_boost"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        if getattr(self, "auto_map", None) is None:
            # Saving a model only adds its own class; whoever loads the folder may want another.
            self.auto_map = dict(AUTO_MAP)
        # `@strict` runs these again, but wraps what they raise into an error that is no `ValueError`.
        self.validate_layer_type()
        self.validate_architecture()

    def layer_slots(self, layer_idx: int) -> tuple[int, ...]:
        """Slots of the raw, the 2x and the 4x compressed level of one layer; none where it has no bank."""
        if self.layer_types[layer_idx] != "state_bank_attention":
            return (0, 0, 0)
        share = 1 if self.slot_shares is None else self.slot_shares[layer_idx]
        return tuple(round(share * slots) for slots in self.memory_slots)

    @property
    def max_keys(self) -> int:
        """Keys that a token sees at most, in the layer with most slots: sinks, slots and window."""
        slots = max(sum(self.layer_slots(index)) for index in range(self.num_hidden_layers))
        return self.num_sink_tokens + slots + 2 * self.segment_length

    @property
    def lossless_length(self) -> int:
        """Tokens up to which the model equals full attention: no layer has lost or compressed anything yet."""
        raw = min(self.layer_slots(index)[0] for index in range(self.num_hidden_layers)) if self.use_memory else 0
        return (self.num_sink_tokens + raw) // self.segment_length * self.segment_length + 2 * self.segment_length

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """The library's; settings that are given beside a saved config must fit it, as if it held them."""
        if "memory_slots" in kwargs:
            # Who says how many a layer has means every layer.
            kwargs.setdefault("slot_shares", None)
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.validate_layer_type()
        config.validate_architecture()
        return found

    def to_dict(self) -> dict:
        """The library's. PEFT asks for it just before it looks up the default target modules of a model type."""
        if "peft" in sys.modules:
            register_peft_defaults()
        return super().to_dict()

    def validate_architecture(self):
        """Rules between fields. Raises `ValueError` with the value, the rule and the remedy."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        require(self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, f"be one of {', '.join(sorted(ACT2FN))}")
        require(
            self.num_key_value_heads >= 1 and self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"divide num_attention_heads ({self.num_attention_heads})",
        )
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            "head_dim",
            self.head_dim,
            "be even and positive, since RoPE rotates pairs; set `head_dim`, or change `hidden_size`",
        )
        require_budget(self.segment_length, self.num_sink_tokens, self.memory_slots)
        shares = self.slot_shares
        require(
            shares is None
            or len(shares) == self.num_hidden_layers
            and all(
                0 <= share < float("inf") and (round(share * self.memory_slots[0]) or not any(self.memory_slots))
                for share in shares
            ),
            "slot_shares",
            shares,
            f"be a number for each of the {self.num_hidden_layers} layers, that leaves it at least one raw slot",
        )
        require(
            self.memory_position in MEMORY_POSITIONS,
            "memory_position",
            self.memory_position,
            f"be one of {MEMORY_POSITIONS}",
        )
        require(
            len(self.routing_thresholds) == 2 and all(0 < tau < 1 for tau in self.routing_thresholds),
            "routing_thresholds",
            self.routing_thresholds,
            "be two numbers strictly between 0 and 1, for levels 1 and 2",
        )
        require(
            self.salience_pooling >= 1 and self.salience_pooling % 2 == 1,
            "salience_pooling",
            self.salience_pooling,
            "be an odd number of tokens, so that it has a middle (1 means none)",
        )
        for name in ("usage_weight", "salience_boost", "recency_weight", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), name, value, "be a number of at least 0 (0 means none)")
        is_one = isinstance(self.attention_boost, (int, float))
        boosts = [self.attention_boost] * self.num_hidden_layers if is_one else self.attention_boost
        require(
            len(boosts) == self.num_hidden_layers and all(0 <= boost < float("inf") for boost in boosts),
            "attention_boost",
            self.attention_boost,
            f"be a number of at least 0 (0 means none), or a list of one for each of the {self.num_hidden_layers} layers",
        )
        require(0 < self.salience_scale < float("inf"), "salience_scale", self.salience_scale, "be a number above 0")
        require(
            self.retention_score in RETENTION_SCORES,
            "retention_score",
            self.retention_score,
            f"be one of {RETENTION_SCORES}",
        )
        require(
            self.short_conv_kernel >= 0, "short_conv_kernel", self.short_conv_kernel, "be at least 0 (0 means none)"
        )
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type")
        require(
            rope_type in ROPE_TYPES,
            "rope_parameters['rope_type']",
            rope_type,
            f"be one of {tuple(ROPE_TYPES)}, with the same parameters for all layers",
        )
        for name in ("rope_theta", *ROPE_TYPES[rope_type]):
            value = rope.get(name)
            is_number = isinstance(value, (int, float)) and 0 < value < float("inf")
            require(is_number, f"rope_parameters['{name}']", value, f"be a number above 0, which {rope_type!r} needs")
        part = rope.get("partial_rotary_factor")
        require(
            part in (None, 1) or rope_type == "proportional",
            "rope_parameters['partial_rotary_factor']",
            part,
            f"be 1, since all of each head is rotated; leave it out, or use 'proportional' instead of {rope_type!r}",
        )
        require(0 <= self.hidden_dropout < 1, "hidden_dropout", self.hidden_dropout, "be a probability below 1")
        has_one = self.memory_position == "constant" and any(self.memory_slots)
        positions = self.num_sink_tokens + 1 + 2 * self.segment_length if has_one else self.max_keys
        require(
            positions <= self.max_position_embeddings,
            "num_sink_tokens + memory slots (of the largest layer) + 2 * segment_length",
            positions,
            f"not exceed the trained positions, max_position_embeddings ({self.max_position_embeddings}); "
            "use fewer slots or a shorter segment",
        )

    def validate_layer_type(self):
        """Layer types are our own; the library's list does not know them."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        require(not unknown, "layer_types", unknown, f"be one of {LAYER_TYPES}")
        require(
            len(self.layer_types) == self.num_hidden_layers,
            "layer_types",
            f"{len(self.layer_types)} entries",
            f"have one entry per layer ({self.num_hidden_layers})",
        )


def require_budget(segment_length: int, num_sink_tokens: int, memory_slots: Sequence[int]) -> None:
    """Rules of the run-time settings that no reading can do without, unlike that they fit the trained positions."""
    require(segment_length >= 1, "segment_length", segment_length, "be at least 1")
    require(num_sink_tokens >= 0, "num_sink_tokens", num_sink_tokens, "be at least 0")
    require(
        len(memory_slots) == 3 and min(memory_slots) >= 0,
        "memory_slots",
        memory_slots,
        "be three counts of at least 0, for the raw, the 2x and the 4x compressed level",
    )
    require(
        memory_slots[0] > 0 or not any(memory_slots),
        "memory_slots",
        memory_slots,
        "have raw slots when there are compressed ones, since entries enter through level 0",
    )


def require(holds: bool, name: str, value, rule: str) -> None:
    """Raises `ValueError` with the value, the rule and the remedy unless the rule holds."""
    if not holds:
        raise ValueError(f"`{name}` is {value!r}, but must {rule}.")


__all__ = ["BwrDncConfig"]
