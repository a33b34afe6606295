"""What a memory is compared with: the same weights, reading with another policy of what stays."""

from statistics import fmean

from transformers import PreTrainedModel

from ..configuration_bwr_dnc import RETENTION_SCORES

# The model itself, and the controls that every evaluation runs beside it.
CONTROLS = {
    "memory": "the model as it is",
    "full": "full attention: slots that hold everything",
    "window": "sinks and window only",
    "equal_slot_window": "sinks and a longer window: all slots raw, filled with the most recent tokens",
    "random": "equal slots and levels, evicted at random: in every row and with every seed the same places, others in each layer and head",
}
# Where salience does not decide what stays, it does not weigh what is read either.
UNSALIENT = {"attention_boost": 0.0, "use_salience": False}
# Only where the answers' places are known: in measuring facts.
PINNED = "pinned"
POLICIES = (
    CONTROLS
    | {
        PINNED: "the model as it is, with the facts pinned: what could be answered if nothing asked for were ever lost",
        "raw": "as many slots, all raw",
    }
    | {f"score:{score}": f"equal slots and levels, evicted by {score.replace('_', ' ')}" for score in RETENTION_SCORES}
)


def policy_settings(model: PreTrainedModel, policy: str, length: int) -> dict:
    """
    The settings of the model's config that make a policy, for texts of up to `length` tokens.

    Raises:
        ValueError: for a policy that is not in `POLICIES`.
    """
    config = model.config
    num_slots = sum(config.memory_slots)
    by_layer = [
        sum(config.layer_slots(i)) for i, kind in enumerate(config.layer_types) if kind == "state_bank_attention"
    ]
    in_a_layer = round(fmean(by_layer)) if by_layer else num_slots
    recent = {"memory_slots": [in_a_layer, 0, 0], "slot_shares": None, "retention_score": "recency"}
    settings: dict[str, dict] = {
        "memory": {},
        "full": {"use_memory": True, "memory_slots": [max(length, num_slots), 0, 0], "slot_shares": None},
        "window": {"use_memory": False},
        "equal_slot_window": recent | UNSALIENT,
        "random": {"retention_score": "random", **UNSALIENT},
        "raw": {"memory_slots": [num_slots, 0, 0]},
        "score:salience": {"retention_score": "salience"},
    }
    if policy == PINNED:
        raise ValueError(
            f"the policy {PINNED!r} needs to know where answers stand; measure `facts` with it, or another policy"
        )
    if policy not in POLICIES:
        raise ValueError(f"the policy is {policy!r}, but must be one of {', '.join(POLICIES)}")
    return settings.get(policy, {"retention_score": policy.removeprefix("score:"), **UNSALIENT})
