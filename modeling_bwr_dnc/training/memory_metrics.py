"""
What a memory holds and forgets, and how far its parameters move, as numbers for a training log.

Shapes: `B` rows, `G` key/value heads, `N` entries before the window.
"""

import torch
from torch import nn

from ..layer_state import BankState
from ..memory_parameters import MEMORY
from ..state_bank import StateBankCache


@torch.no_grad()
def bank_metrics(cache: StateBankCache) -> dict[str, float]:
    """
    Means over all bank layers, rows and heads of a memory.

    `memory/fill_L`: share of the slots of level L in use. `memory/evicted`: share of the tokens outside the window (sinks
    aside) that no slot stands for any more. `memory/compressed`: share that only a merged slot stands for.
    `memory/salience_{low,median,high}`: 5%, 50%, 95% quantiles of the salience logits of held slots.
    `memory/usage`: mean decayed share of attention per held slot. Empty without banks.
    """
    banks = [state for state in cache.states if any(state.settings.memory_slots)]
    if not banks:
        return {}
    metrics = {
        f"memory/fill_{level}": _mean([_fill(state, level) for state in banks if state.settings.memory_slots[level]])
        for level in range(3)
        if any(state.settings.memory_slots[level] for state in banks)
    }
    shares = [share for state in banks for share in _shares(state)]
    if shares:
        metrics["memory/evicted"] = _mean([evicted for evicted, _ in shares])
        metrics["memory/compressed"] = _mean([compressed for _, compressed in shares])
    held = [_slots(state) & (state.entries.mass > 0) for state in banks]
    salience = torch.cat([state.entries.salience[mask] for state, mask in zip(banks, held, strict=True)]).float()
    if len(salience):
        usage = torch.cat([state.entries.usage[mask] for state, mask in zip(banks, held, strict=True)])
        # `quantile` takes at most 16 million values.
        salience = salience[:: len(salience) // 1_000_000 + 1]
        quantiles = salience.quantile(salience.new_tensor([0.05, 0.5, 0.95])).tolist()
        metrics |= dict(
            zip(("memory/salience_low", "memory/salience_median", "memory/salience_high"), quantiles, strict=True)
        )
        metrics["memory/usage"] = usage.mean().item()
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _slots(state: BankState) -> torch.Tensor:
    """Which entries [B, G, N] before the window are slots, and not sinks or room that a row does not fill."""
    index = torch.arange(len(state.entries), device=state.keys.device)
    last = torch.tensor([state.num_prefix(i) for i in range(len(state.rows))], device=index.device)
    first = last - torch.tensor([row.num_slots for row in state.rows], device=index.device)
    inside = (index >= first[:, None]) & (index < last[:, None])
    return inside[:, None].expand_as(state.entries.level)


def _fill(state: BankState, level: int) -> float:
    used = sum(row.slot_counts[level] for row in state.rows)
    return used / (len(state.rows) * state.settings.memory_slots[level])


def _shares(state: BankState) -> list[tuple[float, float]]:
    """Per row with tokens outside the window: shares of them forgotten, and compressed."""
    mass, slots = state.entries.mass, _slots(state)
    per_head = state.keys.shape[1]
    held = (mass * slots).sum((1, 2)).tolist()
    merged = (mass * (slots & (state.entries.level > 0))).sum((1, 2)).tolist()
    shares = []
    for row, held_mass, merged_mass in zip(state.rows, held, merged, strict=True):
        outside = (row.window_start - state.settings.num_sink_tokens) * per_head
        if outside > 0:
            shares.append((1 - held_mass / outside, merged_mass / outside))
    return shares


class GateMovement:
    """How far the memory parameters have moved since the last look: public gates often do not move at all."""

    def __init__(self, model: nn.Module):
        self.parameters = {
            kind: [p for name, p in model.named_parameters() if f"{MEMORY}{kind}" in name and p.requires_grad]
            for kind in ("salience", "routing", "compressor")
        }
        self.before = {kind: self._values(kind) for kind in self.parameters}

    def _values(self, kind: str) -> list[torch.Tensor]:
        values = [parameter.detach() for parameter in self.parameters[kind]]
        return [(value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for value in values]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """`memory/KIND_moved`: root mean square change of a parameter since the last call; `memory/KIND_size`: its size."""
        metrics = {}
        for kind, before in self.before.items():
            if not before:
                continue
            now = self._values(kind)
            count = sum(value.numel() for value in now)
            moved = sum((new.float() - old.float()).square().sum() for new, old in zip(now, before, strict=True))
            size = sum(value.float().square().sum() for value in now)
            metrics[f"memory/{kind}_moved"] = (moved / count).sqrt().item()
            metrics[f"memory/{kind}_size"] = (size / count).sqrt().item()
            self.before[kind] = now
        return metrics
