"""
The state bank as a specification: one row, one head, one token at a time, plain lists. Slow, and meant to be read;
the fast path has to give the same outputs, the same bank and the same gradients.

Shapes: `H` query heads, `G` key/value heads (`H = G * R`), `N` tokens of the row, `D` head width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

USAGE_STRIDE = 8  # every eighth query of a segment measures what is being read


@dataclass(eq=False)
class Entry:
    """What a key/value head keeps in one place: a token, or two to four of them merged."""

    key: Tensor  # [D], before RoPE
    value: Tensor  # [D]
    delta: Tensor  # salience logit
    bias: Tensor  # salience bias, at most 0.05, 0 for an untrained head
    positions: list[int]  # of its source tokens, in order of time
    token_ids: list[int]
    level: int = 0
    usage: float | Tensor = 0.0  # running share of the attention, in [0, 1]
    received: float | Tensor = 0.0  # attention received from the measuring queries of the present segment

    @property
    def mass(self) -> int:
        return len(self.positions)

    @property
    def time(self) -> int:
        return self.positions[-1]


def naive_state_bank_attention(
    queries: Tensor,  # [H, N, D], before RoPE, like the keys
    keys: Tensor,  # [G, N, D]
    values: Tensor,  # [G, N, D]
    delta: Tensor,  # [G, N], salience logits, 0 for an untrained head
    complexity: Tensor,  # [H, N], the z of the routing, 4 for an untrained head
    token_ids: Sequence[int],
    inv_freq: Tensor,  # [D / 2]
    merge: Callable[..., tuple[Tensor, Tensor]],  # (g, key_a, value_a, mass_a, key_b, value_b, mass_b) -> (key, value)
    *,
    segment_length: int,
    num_sink_tokens: int,
    memory_slots: Sequence[int],
    memory_position: str = "rank",
    routing_thresholds: Sequence[float] = (0.5, 0.8),
    use_hard_routing: bool = False,
    usage_weight: float = 1.0,
    salience_pooling: int = 1,
    salience_boost: float = 0.0,
    attention_boost: float = 0.0,
    salience_scale: float = 1.0,
    recency_weight: float = 0.0,  # per 1,024 tokens
) -> tuple[Tensor, list[list[Entry]]]:
    """Returns the attention output [H, N, D] and, per key/value head, the slots held at the end, in order of time."""
    (num_heads, num_tokens, width), num_groups = queries.shape, keys.shape[0]
    ratio = num_heads // num_groups
    outputs, banks = {}, []

    def rotate(vector: Tensor, position: int) -> Tensor:
        cos, sin = (position * inv_freq).cos(), (position * inv_freq).sin()
        left, right = vector.chunk(2)
        return torch.cat([left * cos - right * sin, right * cos + left * sin])

    def route_bias(z: Tensor, level: int) -> Tensor | float:
        if level == 0:
            return 0.0
        threshold = math.log(routing_thresholds[level - 1] / (1 - routing_thresholds[level - 1]))
        if use_hard_routing:
            return 0.0 if z >= threshold else -math.inf
        return logsigmoid(z - threshold) - logsigmoid(z.new_tensor(4.0 - threshold))

    def retention(entry: Entry) -> tuple[float, int]:  # of two equals the newer is better retained
        salience = entry.delta.detach() + salience_boost * entry.delta.detach().clamp(min=0)
        total = salience + usage_weight * entry.usage + recency_weight * entry.time / 1024
        return float(total.float()), entry.time  # rounded, so that what is equal but for the order of a sum is equal

    def settle(g: int, level: int, slots: list[Entry], arrived: list[Entry]) -> list[Entry]:
        """Take `arrived` into `level`; what is too much there goes up, two by two. A level of size 0 forgets."""
        if memory_slots[level] == 0:
            return []
        members = [entry for entry in slots if entry.level == level]
        members += [replace(entry, level=level) for entry in arrived]
        members.sort(key=retention, reverse=True)
        kept, demoted = members[: memory_slots[level]], members[memory_slots[level] :]
        if level == 2:
            return kept
        demoted.sort(key=lambda entry: entry.time)
        leaving = []
        for a, b in zip_longest(demoted[0::2], demoted[1::2]):
            if b is None:
                leaving.append(a)
            elif b.time - a.time > segment_length:
                leaving.append(max(a, b, key=retention))
            else:
                key, value = merge(g, a.key, a.value, a.mass, b.key, b.value, b.mass)
                delta = torch.maximum(a.delta, b.delta)
                bias = ((a.mass * a.bias.exp() + b.mass * b.bias.exp()) / (a.mass + b.mass)).log()
                sources = (a.positions + b.positions, a.token_ids + b.token_ids)
                leaving.append(Entry(key, value, delta, bias, *sources, usage=a.usage + b.usage))
        return kept + settle(g, level + 1, slots, leaving)

    for g in range(num_groups):
        sinks: list[Entry] = []
        slots: list[Entry] = []
        window: list[Entry] = []
        for n in range(num_tokens):
            segment, offset = divmod(n, segment_length)
            if offset == 0 and segment >= 2:
                # Segment - 2 leaves the window, once segment - 1 has measured what it read.
                for entry in slots + window:
                    measured = entry.received / (ratio * len(range(0, segment_length, USAGE_STRIDE)))
                    entry.usage = 0.9 * entry.usage + 0.1 * measured if entry in slots else measured
                leaving = [entry for entry in window if entry.time < (segment - 1) * segment_length]
                for entry in leaving:
                    around = range(entry.time - salience_pooling // 2, entry.time + salience_pooling // 2 + 1)
                    held = [i for i in around if (segment - 2) * segment_length <= i < n]
                    entry.delta = delta[g, held].mean()
                window = window[len(leaving) :]
                slots = sorted(settle(g, 0, slots, leaving), key=lambda entry: entry.time)
            if offset == 0:
                for entry in slots + window:
                    entry.received = 0.0
            bias = logsigmoid(delta[g, n] + 3) - logsigmoid(delta.new_tensor(3.0))
            token = Entry(keys[g, n], values[g, n], delta[g, n], bias, [n], [int(token_ids[n])])
            (sinks if n < num_sink_tokens else window).append(token)

            seen = sinks + slots + window
            place = list(range(len(seen)))
            if memory_position == "constant" and slots:
                shared = len(sinks)
                place = [*range(shared), *[shared] * len(slots), *range(shared + 1, shared + 1 + len(window))]
            num_raw = sum(entry.level == 0 for entry in slots)
            outside = max((segment - 1) * segment_length - num_sink_tokens, 0)
            pressure = 1 - num_raw / outside if outside else 0.0
            for h in range(g * ratio, (g + 1) * ratio):
                query = rotate(queries[h, n], place[-1])
                logits = [query @ rotate(entry.key, at) / math.sqrt(width) for entry, at in zip(seen, place)]
                for i, entry in enumerate(slots, start=len(sinks)):
                    boost = attention_boost * (entry.delta.detach() / salience_scale).clamp(0, 1)
                    logits[i] = logits[i] + math.log(entry.mass) + pressure * (entry.bias + boost)
                    logits[i] = logits[i] + route_bias(complexity[h, n], entry.level)
                weights = torch.stack(logits).softmax(dim=0)
                outputs[h, n] = sum(weight * entry.value for weight, entry in zip(weights, seen))
                if offset % USAGE_STRIDE == 0:
                    for weight, entry in zip(weights.detach(), seen):
                        entry.received = entry.received + weight
        banks.append(slots)
    return torch.stack([torch.stack([outputs[h, n] for n in range(num_tokens)]) for h in range(num_heads)]), banks
