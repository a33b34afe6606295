"""
The StateBank as a cache: `StateBankLayer` puts what one layer remembers (`layer_state`) into a Transformers cache, and
`StateBankCache` is the object a user keeps, saves, forks, batches, reads and edits.

Shapes: `B` rows, `G` key/value heads, `T` tokens, `S` segment length.
"""

import copy
import hashlib
import json
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import cached_file

from .configuration_bwr_dnc import LAYER_TYPES, BwrDncConfig, require
from .layer_state import BankState, RowState, shorten_history
from .memory_ops import ENTRY_COLUMNS, MASKED, QUERY_STRIDE, BankSettings, Entries

STATE_FILE = "state_bank.json"
FORMAT_VERSION = 1


# ---------------------------------------------------------------------------------------------------------------------
# Cache layers
# ---------------------------------------------------------------------------------------------------------------------


class StateBankLayer(CacheLayerMixin):
    """
    One layer of a [`StateBankCache`]: a `BankState`, and the operations that `generate` asks of a cache layer.

    The library finds it by `_layer_type`, so that `DynamicCache(config=...)` builds the right layers. It stores; the
    attention module computes. While `record_past` is on, the state before the latest consolidation of each row is kept,
    so that `crop` can go back over it.
    """

    _layer_type = "state_bank_attention"
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        self.state: BankState | None = None
        self.record_past = False
        # Whether a forward pass has begun to write here and not come to its end.
        self.is_unfinished = False
        # Per row, the state (of one row or several) before its latest consolidation, and its index there.
        self.journal: list[tuple[BankState, int] | None] = []

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """Whether taking back the latest step is exact: not with rows that a batch may have finished earlier."""
        return self.batch_size <= 1

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys before RoPE, [B, G, C, D]."""
        return None if self.state is None else self.state.keys

    @property
    def values(self) -> torch.Tensor | None:
        """Values, [B, G, C, D]."""
        return None if self.state is None else self.state.values

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, with what is recorded to go back to."""
        recorded = {id(entry[0]): entry[0] for entry in self.journal if entry is not None}
        states = [*recorded.values(), *([] if self.state is None else [self.state])]
        return sum(tensor.nbytes for state in states for tensor in state.tensors().values())

    def lazy_initialization(self, key_states, value_states) -> None:
        raise ValueError("A state bank layer is written by BWR-DNC's own attention; it has no early initialization.")

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError(
            f"A cache layer of type {self._layer_type!r} cannot be written by `update`: only the attention of a BWR-DNC "
            "model can. Use this cache with the model that made it."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen by the widest row, columns of padding included."""
        return 0 if self.state is None else max((row.columns for row in self.state.rows), default=0)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def note_consolidation(self, before: BankState, rows: list[int], batch_size: int) -> None:
        """Keep the state `before` a consolidation of `rows` (row i of it is row `rows[i]` of the batch)."""
        if len(self.journal) != batch_size:
            self.journal = [None] * batch_size
        # Consolidation uses a state up, and the next queries are written in place.
        before = before.map(torch.Tensor.clone)
        for index, row in enumerate(rows):
            self.journal[row] = (before, index)

    def reset(self) -> None:
        self.state, self.journal, self.is_unfinished = None, [], False

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `function` to every tensor held, with what is recorded to go back to."""
        if self.state is not None:
            self.state = self.state.map(function)
        # Rows that have consolidated together share a state.
        recorded = {id(entry[0]): entry[0] for entry in self.journal if entry is not None}
        changed = {key: state.map(function) for key, state in recorded.items()}
        self.journal = [None if entry is None else (changed[id(entry[0])], entry[1]) for entry in self.journal]

    def select(self, indices: Iterable[int]) -> None:
        """Keep copies of the rows at `indices`, in that order."""
        indices = [int(index) for index in indices]
        if self.state is None:
            return
        self.state = self.state.select(indices)
        if self.journal:
            self.journal = [self.journal[index] for index in indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        require(repeats >= 1, "repeats", repeats, "be at least 1, so that every row stays")
        if self.state is not None:
            self.select(index for index in range(len(self.state.rows)) for _ in range(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            indices = torch.arange(len(self.state.rows))[indices.cpu()]
            self.select(indices.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forget the last `-tokens_to_remove` tokens of every row, exactly.

        Any of the last `segment_length` tokens can be taken back; a row that has consolidated since needs
        `activate_past_recording` to have been called before. Tokens given to `forget` cannot be taken back: their ids, which the
        hash of what was read needs, are gone. Nothing changes if one row cannot go back.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` got {tokens_to_remove}, but takes the negative number of tokens to remove; pass "
                f"{-tokens_to_remove} to remove as many."
            )
        count = -tokens_to_remove
        if count == 0 or self.state is None:
            return
        check_finished([self])
        state, segment_length = self.state, self.state.settings.segment_length
        history, earlier = state.history.clone(), {}
        targets = [row.unfed(count) for row in state.rows]
        for index, (row, target) in enumerate(zip(state.rows, targets, strict=True)):
            removed = row.seen - target.seen
            if target.seen < 0 or removed > max(segment_length, row.seen if row.window_start == 0 else 0):
                raise ValueError(
                    f"`crop` was asked to remove {count} of {row.columns} tokens, but at most the last segment_length = "
                    f"{segment_length} tokens can be taken back; read the sequence again up to the token you want."
                )
            boundary = row.window_start + segment_length if row.window_start else -1
            before = self.journal[index] if self.journal else None
            if removed and target.seen <= boundary and before is not None:
                earlier[index] = before[0].select([before[1]])
            elif target.seen < boundary:
                raise ValueError(
                    f"`crop` was asked to remove {count} tokens, but the memory was consolidated {row.seen - boundary} tokens ago "
                    "and the state before was not kept; call `cache.activate_past_recording()` before reading "
                    "(`forget` gives up what it has kept)."
                )
            end, length = row.seen - row.window_start, state.length(index)
            if state.holes is not None and state.holes[index, :, length - removed : length].any():
                raise ValueError(
                    f"`crop` was asked to remove {count} tokens, but some of these have been given to `forget`, and their ids are "
                    "gone; crop before forgetting, or read the sequence again up to the token you want."
                )
            history[index] = shorten_history(history[index], state.window_ids[index, end - removed : end])
        for index, restored in earlier.items():
            if restored.settings != state.settings:
                restored = restored.under(state.settings)
            state = state.replaced([index], restored)
            self.journal[index] = None
        # A span may have been pinned since what is restored was recorded.
        rows = [
            replace(row, seen=target.seen, pinned=target.pinned, columns=target.columns, pads=target.pads)
            for row, target in zip(state.rows, targets, strict=True)
        ]
        self.state = replace(state, rows=rows, history=history).cleared()


class SinkWindowLayer(StateBankLayer):
    """Cache layer of `"sink_window_attention"`: the same state without slots."""

    _layer_type = "sink_window_attention"


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------

_CACHE_LAYERS = {layer._layer_type: layer for layer in (StateBankLayer, SinkWindowLayer)}


class StateBankCache(Cache):
    """
    The bounded memory of a BWR-DNC model, its `past_key_values`.

    Its size does not grow with what was read. Keep it, save it and load it in another process, fork it (`clone`), put
    several into one batch (`stack`), look into it (`memory_report`, `tokens`), and edit it (`pin`, `forget`).

    Example:

    ```python
    >>> cache = StateBankCache(config=model.config)
    >>> model(**tokenizer(long_text, return_tensors="pt"), past_key_values=cache, logits_to_keep=1)
    >>> cache.save_pretrained("memory_of_that_text")
    >>> later = StateBankCache.from_pretrained("memory_of_that_text", config=model.config)
    >>> model.generate(**tokenizer(question, return_tensors="pt"), past_key_values=later)
    ```
    """

    def __init__(self, config: BwrDncConfig | None = None, layers: list[StateBankLayer] | None = None):
        """From the `config` of a model, empty; or around existing cache `layers`."""
        if (config is None) == (layers is None):
            raise ValueError(
                "StateBankCache takes either the model's `config` or existing `layers`, not both or neither."
            )
        if layers is None:
            kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
            if not kinds or not set(kinds) <= set(LAYER_TYPES):
                raise ValueError(
                    f"StateBankCache got a {type(config).__name__} with layers of type {kinds}, but keeps only {LAYER_TYPES}; pass the config "
                    "of a BWR-DNC model."
                )
            layers = [_CACHE_LAYERS[kind]() for kind in kinds]
        super().__init__(layers=layers)
        # The model that wrote last, and the fingerprint that the state was loaded with.
        self._writer: weakref.ref | None = None
        self._loaded_fingerprint: str | None = None

    @classmethod
    def wrap(cls, cache: Cache) -> "StateBankCache":
        """The same layers as a `StateBankCache`. Raises `ValueError` for a cache of any other kind."""
        layers = getattr(cache, "layers", None)
        kinds = {getattr(layer, "_layer_type", None) for layer in layers} if layers else {None}
        if not kinds <= set(LAYER_TYPES) or any(not hasattr(layer, "journal") for layer in layers):
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__} with layers of type {sorted(map(str, kinds))}, but a BWR-DNC "
                f"model keeps its memory in layers of type {LAYER_TYPES}; pass `StateBankCache(config=model.config)`, or "
                "nothing, and leave `cache_implementation` unset."
            )
        if getattr(cache, "offloading", False):
            raise ValueError(
                "`past_key_values` asks for offloading, but the memory of a BWR-DNC model is bounded and stays on its "
                "device; leave `cache_implementation` unset."
            )
        if isinstance(cache, cls):
            return cache
        wrapped = cls(layers=layers)
        for name in ("_writer", "_loaded_fingerprint", "_is_user_defined"):
            if hasattr(cache, name):
                setattr(wrapped, name, getattr(cache, name))
        return wrapped

    def written_by(self, model: torch.nn.Module) -> None:
        """Note the model about to write. Raises `ValueError` if it has other weights than what was read before was read with."""
        if self._writer is not None and self._writer() is model:
            return
        known = self.weights_fingerprint if self.states else None
        if known is not None and (fingerprint := fingerprint_weights(model)) != known:
            raise ValueError(
                f"The state was read by a model whose weights have the fingerprint {known}, but this model's is {fingerprint}; a memory is "
                "only meaningful to the weights that wrote it. Continue it with those, in the same precision, and with the same adapters "
                "active."
            )
        self._writer = weakref.ref(model)

    @property
    def weights_fingerprint(self) -> str | None:
        """
        Fingerprint of the model that wrote last, of its weights as they are now. Without that model, the one that the state was
        loaded with; None if there is none.
        """
        model = self._writer() if self._writer is not None else None
        return self._loaded_fingerprint if model is None else fingerprint_weights(model)

    def reset(self) -> None:
        """Forget everything, also which weights it was of."""
        super().reset()
        self._writer = self._loaded_fingerprint = None

    def __copy__(self) -> "StateBankCache":
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict) -> "StateBankCache":
        copied = copy.copy(self)
        copied.layers = copy.deepcopy(self.layers, memo)
        return copied

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_loaded_fingerprint": self.weights_fingerprint, "_writer": None}

    # ------------------------------------------------------------------------------------------------- size and rows

    @property
    def states(self) -> list[BankState]:
        """The state of every layer; empty before the first token."""
        return [layer.state for layer in self.layers if layer.state is not None]

    @property
    def rows(self) -> list[RowState]:
        """Counters of every row, those of layer 0: equal in all layers but for slots and pins, of which layers without slots have none."""
        return self.layers[0].state.rows if self.states else []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by the widest row, columns of padding included, as `generate` counts."""
        return self.layers[layer_idx].get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, with what is recorded to go back to; constant once every level is full."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def consolidates_next(self) -> bool:
        """
        Whether the window of a row is full, so that its next token consolidates. A compiled decoding step, which would take minutes to
        compile consolidation, too, leaves that token to the model as it is.
        """
        room = 2 * self.layers[0].state.settings.segment_length if self.states else 0
        return any(row.seen - row.window_start == room for row in self.rows)

    @property
    def history(self) -> torch.Tensor | None:
        """Rolling hash of the token ids each row has read, [B] int64."""
        return self.layers[0].state.history if self.states else None

    def detach(self) -> "StateBankCache":
        """Cut the gradient: what was read so far becomes a constant (truncated back-propagation through time)."""
        for layer in self.layers:
            layer.apply(torch.Tensor.detach)
        return self

    def clone(self) -> "StateBankCache":
        """An independent copy, that can be continued differently."""
        cloned = copy.copy(self)
        cloned.layers = [copy.copy(layer) for layer in self.layers]
        for layer in cloned.layers:
            layer.journal = list(layer.journal)
            if layer.state is not None:
                layer.state = layer.state.map(torch.Tensor.clone)
        return cloned

    def to(self, device: torch.device | str | None) -> "StateBankCache":
        """Move every tensor to a device, in place; None: where it is, as torch does. Raises `ValueError` for anything else, a type among them."""
        if device is None:
            return self
        if not isinstance(device, (str, int, torch.device)):
            raise ValueError(
                f"`StateBankCache.to` takes a device, but was given {device!r}; a memory is in the precision that it was read in, "
                "to change it read the text again."
            )
        for layer in self.layers:
            layer.apply(lambda tensor: tensor.to(device))
        return self

    @staticmethod
    def stack(caches: "list[StateBankCache]") -> "StateBankCache":
        """
        One batch of the rows of several caches, which may stand at different positions.

        Raises `ValueError` for an empty cache, and for caches that differ in weights, layers, settings, type or device.
        """
        if not caches or any(not cache.states for cache in caches):
            raise ValueError(
                "StateBankCache.stack takes at least one cache, and each must have read at least one token."
            )
        check_finished(layer for cache in caches for layer in cache.layers)
        # Where the model that wrote a cache is gone, and it was not loaded either, the others say which weights it was.
        first = next(
            (c for c in caches if c._loaded_fingerprint or (c._writer and c._writer() is not None)), caches[0]
        )
        for cache in caches:
            _require_same_settings(first, cache)
        stacked = StateBankCache(layers=[type(layer)() for layer in first.layers])
        stacked._writer, stacked._loaded_fingerprint = first._writer, first._loaded_fingerprint
        for index, layer in enumerate(stacked.layers):
            layer.state = BankState.stack([cache.layers[index].state for cache in caches]).without_columns()
        return stacked

    def unstack(self) -> "list[StateBankCache]":
        """One cache per row, independent of this one."""
        caches = []
        for row in range(len(self.rows)):
            cache = copy.copy(self)
            cache.layers = [copy.copy(layer) for layer in self.layers]
            for layer in cache.layers:
                layer.select([row])
                if layer.state is not None:
                    layer.state = layer.state.without_columns()
            caches.append(cache)
        return caches

    # ---------------------------------------------------------------------------------------------- reading, editing

    def memory_report(self) -> list[dict]:
        """
        What every layer, level and row of the memory holds.

        Returns dicts with `layer`, `level`, `row`, `used` and `capacity` (slots per key/value head), and means over the
        held slots of all heads: `mass` (source tokens per slot), `salience` (logit), `usage` (decayed share of attention),
        `age` (tokens since its latest source). Means are 0.0 where nothing is held.
        """
        report = []
        for index, state in enumerate(layer.state for layer in self.layers):
            if state is None or not any(state.settings.memory_slots):
                continue
            for row_index, row in enumerate(state.rows):
                slots = _slots_of_row(state, row_index)
                for level, capacity in enumerate(state.settings.memory_slots):
                    held = (slots.level == level) & (slots.mass > 0)
                    count = held.sum().item()

                    def mean(values, held=held, count=count):
                        return values[held].cpu().double().mean().item() if count else 0.0

                    report.append(
                        {
                            "layer": index,
                            "level": level,
                            "row": row_index,
                            "used": count // held.shape[1] if count % held.shape[1] == 0 else count / held.shape[1],
                            "capacity": capacity,
                            "mass": mean(slots.mass),
                            "salience": mean(slots.salience),
                            "usage": mean(slots.usage),
                            "age": mean(row.seen - 1 - slots.time),
                        }
                    )
        return report

    def tokens(self, row: int = 0) -> list[dict]:
        """
        What each held slot of a row stands for, in order of time.

        Returns dicts with `layer`, `head` (key/value head), `level`, `positions` (source positions), `token_ids` (-1 where
        the model was given embeddings), `salience` and `usage`. Sinks and the window are held besides, exactly.
        """
        held = []
        for index, state in enumerate(layer.state for layer in self.layers):
            if state is None:
                continue
            slots = _slots_of_row(state, *_chosen_rows(state, row))
            columns = [getattr(slots, name)[0].tolist() for name in _SLOT_COLUMNS]
            for head, per_head in enumerate(zip(*columns, strict=True)):
                for level, salience, usage, positions, token_ids in zip(*per_head, strict=True):
                    sources = [i for i, position in enumerate(positions) if position >= 0]
                    if sources:
                        held.append(
                            {
                                "layer": index,
                                "head": head,
                                "level": level,
                                "positions": [positions[i] for i in sources],
                                "token_ids": [token_ids[i] for i in sources],
                                "salience": salience,
                                "usage": usage,
                            }
                        )
        return held

    def pin(self, start: int, end: int, row: int | None = None) -> None:
        """
        Never demote the tokens at positions `start` to `end` (exclusive) of a row, or of every row.

        The span may lie ahead of what was read. Raises `ValueError` if part of it has been demoted already, or if the
        pinned spans do not fit the raw slots.
        """
        if not 0 <= start < end:
            raise ValueError(f"`pin` got the span [{start}, {end}), but needs 0 <= start < end, in token positions.")
        banks = [state for state in self.states if any(state.settings.memory_slots)]
        if not banks:
            raise ValueError("`pin` needs a cache that a model with memory slots has read into; read first.")
        pinned = []
        for state in banks:
            for index in _chosen_rows(state, row):
                settings = state.settings
                counters = replace(state.rows[index], pinned=(*state.rows[index].pinned, (start, end)))
                count = counters.num_pinned(settings.num_sink_tokens)
                if count > settings.memory_slots[0]:
                    raise ValueError(
                        f"`pin` would hold {count} tokens, but a layer has {settings.memory_slots[0]} raw slots; pin a shorter "
                        "span, or give the model more (`memory_slots`)."
                    )
                outside = torch.arange(start, max(start, min(end, counters.window_start)), device=state.keys.device)
                raw = _prefix_of_row(state, index)
                sources = raw.positions[0, :, :, 0].masked_fill((raw.level[0] > 0) | (raw.mass[0] > 1), -1)
                if not all(torch.isin(outside, head).all() for head in sources):
                    raise ValueError(
                        f"`pin` got the span [{start}, {end}), but part of it has been compressed or forgotten already; pin a "
                        "span before it leaves the raw slots."
                    )
                pinned.append((state, index, counters))
        for state, index, counters in pinned:
            state.rows[index] = counters

    def forget(self, start: int, end: int, row: int | None = None) -> None:
        """
        Remove every entry that stems from the positions `start` to `end` (exclusive) of a row, or of every row.

        A compressed slot goes as a whole when one of its sources is in the span. What later tokens had already taken over
        from them while reading stays in those tokens. What `activate_past_recording` had kept to go back to is given up, of all rows.
        """
        if not 0 <= start < end:
            raise ValueError(
                f"`forget` got the span [{start}, {end}), but needs 0 <= start < end, in token positions."
            )
        for layer in self.layers:
            if layer.state is not None:
                layer.state = _forget_span(layer.state, start, end, row)
                layer.journal = []

    # ----------------------------------------------------------------------------------------------------------- files

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Write the memory to a folder: `state_bank.json`, and the tensors in a safetensors file that it names.

        Either the new state is complete or the old one stays: files are written under temporary names, synced, renamed, and
        the JSON, which holds the sha256 of the tensors and its own, comes last.

        Save before the weights of the model that wrote the state change: their fingerprint is taken now. Warns if that model is
        gone: the state is then saved without one, and any weights will be taken for those that wrote it.
        """
        if not self.states:
            raise ValueError("`save_pretrained` got an empty cache; read at least one token first.")
        check_finished(self.layers)
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = self.weights_fingerprint
        if fingerprint is None:
            warnings.warn(
                "The model that wrote this state is gone, so the state is saved without the fingerprint of its weights, and loading "
                "cannot check that the same ones read it; keep the model until its memory is saved.",
                stacklevel=2,
            )
        tensors = {}
        for index, state in enumerate(self.states):
            for name, tensor in state.tensors().items():
                if name not in BankState.DERIVED:
                    # Copies, since layers share their histories and the format forbids sharing.
                    tensors[f"{index}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        blob = save_safetensors(tensors)
        digest = hashlib.sha256(blob).hexdigest()
        description: dict = {
            "format": "bwr_dnc_state_bank",
            "version": FORMAT_VERSION,
            "tensors": f"state_bank-{digest[:16]}.safetensors",
            "sha256": digest,
            "weights_fingerprint": fingerprint,
            "layer_types": [layer._layer_type for layer in self.layers],
            "settings": [asdict(state.settings) for state in self.states],
            "rows": [[asdict(row) for row in state.rows] for state in self.states],
        }
        description["description_sha256"] = _digest_of(description)
        _write_atomically(folder / description["tensors"], blob)
        _write_atomically(folder / STATE_FILE, json.dumps(description, indent=1).encode())
        for old in folder.glob("state_bank-*.safetensors"):
            if old.name != description["tensors"]:
                old.unlink()
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs) -> str:
        """Save into a repository of the Hub (created if missing). The state holds the token ids it remembers."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns="state_bank-*", **kwargs)
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config: BwrDncConfig | None = None,
        device: torch.device | str = "cpu",
        **kwargs,
    ) -> "StateBankCache":
        """
        Load a memory from a folder or a Hub repository (`kwargs` go to the download).

        Args:
            config: of the model that will read it; checked against the state when given.

        Raises `ValueError`, naming what differs, for truncated, altered, foreign or mismatched files. That a model has the weights
        that the state was saved with is checked when it first reads it.
        """
        source = str(pretrained_model_name_or_path)
        folder = os.path.join(source, kwargs.get("subfolder") or "")
        if os.path.isdir(source) and not os.path.isfile(os.path.join(folder, STATE_FILE)):
            raise ValueError(
                f"{folder!r} has no {STATE_FILE}; name a folder written by `StateBankCache.save_pretrained`."
            )
        try:
            path = cached_file(source, STATE_FILE, **kwargs)
        except OSError as error:
            raise ValueError(
                f"{source!r} is neither a folder nor a repository that can be reached ({error}); name a folder written by "
                "`StateBankCache.save_pretrained`, or a repository written by `push_to_hub`."
            ) from error
        try:
            description = json.loads(Path(path).read_bytes())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no JSON ({error}); the file is damaged, restore it from a copy.") from None
        if not isinstance(description, dict) or description.get("format") != "bwr_dnc_state_bank":
            raise ValueError(
                f"{path} does not describe a BWR-DNC state bank; name a folder written by `save_pretrained`."
            )
        if description.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {description.get('version')!r}, but this code reads {FORMAT_VERSION}; "
                "use the version of the code that wrote it."
            )
        if description.get("description_sha256") != _digest_of(description):
            raise ValueError(f"{path} is altered: it does not have the sha256 that it states; restore it from a copy.")
        try:
            tensors_path = cached_file(source, description["tensors"], **kwargs)
            blob = Path(tensors_path).read_bytes()
            digest = hashlib.sha256(blob).hexdigest()
            if digest != description["sha256"]:
                raise ValueError(
                    f"{tensors_path} has sha256 {digest[:16]}..., but {STATE_FILE} says {description['sha256'][:16]}...: the "
                    "tensors are truncated or altered; restore both files from a copy."
                )
            cache = cls(layers=[_CACHE_LAYERS[kind]() for kind in description["layer_types"]])
            # Copied to where torch puts tensors: products can differ in the last bit with where in memory a matrix begins.
            tensors = {name: tensor.clone() for name, tensor in load_safetensors(blob).items()}
            for index, layer in enumerate(cache.layers):
                layer.state = _state_from_files(description, tensors, index)
            cache._loaded_fingerprint = description["weights_fingerprint"]
        except (KeyError, IndexError, TypeError, OSError) as error:
            raise ValueError(
                f"{path} is damaged or incomplete ({type(error).__name__}: {error}); restore the folder from a copy."
            ) from error
        if config is not None:
            check_matches_config(cache, config)
        return cache.to(device)


_SLOT_COLUMNS = ("level", "salience", "usage", "positions", "token_ids")


def _chosen_rows(state: BankState, row: int | None) -> list[int]:
    """The row that is asked for, negative from the end; None: all. Raises `ValueError` if there is no such row."""
    rows = list(range(len(state.rows)))
    if row is not None and not -len(rows) <= row < len(rows):
        raise ValueError(
            f"`row` is {row}, but must be one of the {len(rows)} rows of the memory: from 0 on, or from -1 backwards."
        )
    return rows if row is None else [rows[row]]


def _prefix_of_row(state: BankState, row: int) -> Entries:
    """Entries before the window of one row, batch of one."""
    return state.entries.map(lambda tensor: tensor[row : row + 1, :, : state.num_prefix(row)])


def _slots_of_row(state: BankState, row: int) -> Entries:
    """Slots of one row, without its sinks, batch of one."""
    num_sinks = state.num_prefix(row) - state.rows[row].num_slots
    return _prefix_of_row(state, row).map(lambda tensor: tensor[:, :, num_sinks:])


def _forget_span(state: BankState, start: int, end: int, row: int | None) -> BankState:
    """A copy of `state` without what stems from a span, see `StateBankCache.forget`: holes stand in its place."""
    state = state.map(torch.Tensor.clone).with_holes()
    chosen = torch.zeros(len(state.rows), dtype=torch.bool, device="cpu")
    chosen[_chosen_rows(state, row)] = True
    chosen = chosen.to(state.keys.device)
    positions = state.entries.positions
    gone = ((positions >= start) & (positions < end)).any(-1) & chosen[:, None, None]  # [B, G, N]
    everywhere = F.pad(gone, (0, state.keys.shape[2] - gone.shape[2]))
    for index, counters in enumerate(state.rows):
        if not chosen[index]:
            continue
        shift = state.conv_reach - counters.window_start
        state.conv_inputs[index, max(start + shift, 0) : max(min(end, counters.seen) + shift, 0)] = 0
        offset = state.num_prefix(index) - counters.window_start
        first, last = max(start, counters.window_start), min(end, counters.seen)
        if first < last:
            everywhere[index, :, offset + first : offset + last] = True
            state.holes[index, :, offset + first : offset + last] = MASKED
            window = slice(first - counters.window_start, last - counters.window_start)
            state.window_salience[index, :, window] = 0
            state.window_ids[index, window] = -1
            segment_start = counters.seen - 1 - (counters.seen - 1) % state.settings.segment_length
            stored = [i for i in range(state.queries.shape[2]) if first <= segment_start + QUERY_STRIDE * i < last]
            state.queries[index, :, stored] = 0
            state.complexity[index, :, stored] = 0
    entries = state.entries
    for name in ("salience", "salience_bias", "usage"):
        getattr(entries, name).masked_fill_(gone, 0)
    for name in ("positions", "token_ids"):
        getattr(entries, name).masked_fill_(gone[..., None], -1)
    for tensor in (state.keys, state.values):
        tensor.masked_fill_(everywhere[..., None], 0)
    return replace(state, rotated=None, key_bias=None)


def check_matches_config(cache: StateBankCache, config: BwrDncConfig) -> None:
    """Raise `ValueError`, naming what differs, unless a model of this `config` can continue `cache`."""
    check_finished(cache.layers)
    kinds = [layer._layer_type for layer in cache.layers if layer.state is not None]
    wanted_kinds = list(config.layer_types[: config.num_hidden_layers])
    if kinds != wanted_kinds:
        raise ValueError(
            f"The state has layers {kinds}, but the model has {wanted_kinds}; use the model that made it."
        )
    wanted: dict = {}
    for index, state in enumerate(cache.states):
        found = {
            "segment_length": state.settings.segment_length,
            "num_sink_tokens": state.settings.num_sink_tokens,
            "num_key_value_heads": state.keys.shape[1],
            "head_dim": state.keys.shape[3],
            "num_attention_heads": state.queries.shape[1],
            "short_conv_kernel": state.conv_reach + 1 if state.conv_inputs.shape[1] else 0,
        }
        # Asked once: configs answer slowly, and this runs for every token.
        wanted = wanted or {name: getattr(config, name) for name in found}
        if found != wanted:
            name = next(name for name in found if found[name] != wanted[name])
            raise ValueError(
                f"The state has {name} = {found[name]} (layer {index}), but the model has {wanted[name]}; use the model, and "
                "the settings, that made the state."
            )


def check_finished(layers: Iterable[StateBankLayer]) -> None:
    """Raise `ValueError` if a forward pass was interrupted while it wrote into these layers."""
    if any(layer.is_unfinished for layer in layers):
        raise ValueError(
            "The state is half written: a forward pass that read into it was interrupted. Go on from a copy (`clone`, `save_pretrained`), or "
            "`reset` it and read the text again."
        )


def check_pinned_fit(cache: StateBankCache, settings: list[BankSettings]) -> None:
    """Raise `ValueError` if a layer that goes on with other `settings` would have too few raw slots for what is pinned."""
    # The layers that an early exit leaves out have no state yet.
    for state, wanted in zip(cache.states, settings, strict=False):
        for row in state.rows:
            if row.pinned and (count := row.num_pinned(wanted.num_sink_tokens)) > wanted.memory_slots[0]:
                raise ValueError(
                    f"{count} tokens of the state are pinned, but the model now runs with {wanted.memory_slots[0]} raw slots, of which "
                    "they would be lost; give it at least as many (`memory_slots`, `use_memory`)."
                )


def fingerprint_weights(model: torch.nn.Module) -> str:
    """
    Digest of the names, shapes, types and a sample of the values of all parameters (not of every value), offloaded or not. Of those
    that bitsandbytes packs in 4 bits: of the name, and the sum of all values. And of which of PEFT's adapters are active, or merged; a
    learned prompt is none of the model's weights, and not covered.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if hasattr(parameter, "quant_state") and parameter.device.type != "meta":
            # Their first use may put them in another order and shape.
            packed = parameter.data.view(torch.uint8)
            digest.update(f"{name} {((packed >> 4).sum() + (packed & 15).sum()).item()}".encode())
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter if parameter.device.type != "meta" else _offloaded(model, name)
        if values is not None:
            flat = values.detach().reshape(-1)
            digest.update(flat[:: max(flat.numel() // 16, 1)][:17].cpu().double().numpy().tobytes())
    for name, module in model.named_modules():
        # A property in PEFT's layers alone: in every model of the library it is a method.
        if isinstance(getattr(type(module), "disable_adapters", None), property):
            active = [] if module.disable_adapters else sorted(module.active_adapters)
            digest.update(f"{name} {active} {sorted(getattr(module, 'merged_adapters', ()))}".encode())
    return digest.hexdigest()[:32]


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The values that Accelerate holds elsewhere for a parameter on "meta"; None if it does not."""
    parts = name.split(".")
    # The hook that has them sits on the parameter's module or on a larger block.
    for depth in reversed(range(len(parts))):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            try:
                return one.weights_map[".".join(parts[depth:])].to(model.get_parameter(name).dtype)
            except (AttributeError, KeyError, TypeError):
                continue
    return None


def _require_same_settings(first: StateBankCache, other: StateBankCache) -> None:
    """Raise `ValueError` unless the rows of two caches can stand in one batch."""
    same_writer = first._writer is not None and first._writer == other._writer
    if not same_writer and len({first.weights_fingerprint, other.weights_fingerprint} - {None}) > 1:
        raise ValueError(
            "The caches to stack were written by models with different weights; stack those of one model."
        )
    if len(first.layers) != len(other.layers):
        raise ValueError(
            f"The caches to stack have {len(first.layers)} and {len(other.layers)} layers; stack those of one model."
        )
    for index, (mine, theirs) in enumerate(zip(first.states, other.states, strict=True)):
        if mine.keys.device != theirs.keys.device:
            raise ValueError(
                f"The caches to stack are on {mine.keys.device} and {theirs.keys.device} (layer {index}); move one with `to`."
            )
        if mine.settings != theirs.settings or mine.keys.dtype != theirs.keys.dtype:
            raise ValueError(
                f"The caches to stack differ in layer {index}: {mine.settings}, {mine.keys.dtype} against {theirs.settings}, "
                f"{theirs.keys.dtype}; stack caches of one model and one setting."
            )


def _state_from_files(description: dict, tensors: dict[str, torch.Tensor], index: int) -> BankState:
    """The state of layer `index`. Raises `KeyError` or `TypeError` for files that do not describe one."""
    settings = dict(description["settings"][index])
    settings.pop("layer_idx", None)  # in files of earlier versions
    for name in ("memory_slots", "routing_thresholds"):
        settings[name] = tuple(settings[name])
    rows = [
        RowState(
            **row
            | {
                "slot_counts": tuple(row["slot_counts"]),
                "pinned": tuple(map(tuple, row["pinned"])),
                "pads": _pad_runs(row),
            }
        )
        for row in description["rows"][index]
    ]
    prefix = f"{index}."
    named = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    entries = Entries(*(named.pop(f"entries.{name}") for name in ENTRY_COLUMNS))
    return BankState(settings=BankSettings(**settings), rows=rows, entries=entries, **named)


def _pad_runs(row: dict) -> tuple[tuple[int, int], ...]:
    """Runs of padding of a row in a file; those of earlier versions list the column of each."""
    pads = row["pads"]
    if pads and isinstance(pads[0], int):
        first = row["seen"] - row["columns"] + len(pads)
        pads = [(first + pad - index, 1) for index, pad in enumerate(pads)]
    return tuple(map(tuple, pads))


def _digest_of(description: dict) -> str:
    """sha256 of a description, its own digest aside."""
    rest = {name: value for name, value in description.items() if name != "description_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_atomically(path: Path, blob: bytes) -> None:
    """Write to a temporary name beside `path`, sync, rename; `path` is never seen half written."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
