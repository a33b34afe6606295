"""What a memory is compared with: the same weights, reading with another policy of what stays."""

from transformers import PreTrainedModel

from ..configuration_bwr_dnc import RETENTION_SCORES

# The model itself, and the controls that every evaluation runs beside it.
CONTROLS = {
    "memory": "the model as it is",
    "full": "full attention: slots that hold everything",
    "window": "sinks and window only",
    "equal_slot_window": "sinks and a longer window: all slots raw, filled with the most recent tokens",
    "random": "equal slots and levels, evicted at random",
}
# Where salience does not decide what stays, it does not weigh what is read either.
UNSALIENT = {"attention_boost": 0.0}
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
    if policy == "memory":
        return {}
    if policy == "full":
        return {"use_memory": True, "memory_slots": [max(length, sum(config.memory_slots)), 0, 0], "slot_shares": None}
    if policy == "window":
        return {"use_memory": False}
    if policy == "equal_slot_window":
        slots = {"memory_slots": [sum(config.memory_slots), 0, 0], "slot_shares": None}
        return slots | {"retention_score": "recency", **UNSALIENT}
    if policy == "random":
        return {"retention_score": "random", **UNSALIENT}
    if policy == "raw":
        return {"memory_slots": [sum(config.memory_slots), 0, 0]}
    if policy == PINNED:
        raise ValueError(
            f"the policy {PINNED!r} needs to know where answers stand; measure `facts` with it, or another policy"
        )
    if policy in POLICIES:
        score = policy.removeprefix("score:")
        return {"retention_score": score} | ({} if score == "salience" else UNSALIENT)
    raise ValueError(f"the policy is {policy!r}, but must be one of {', '.join(POLICIES)}")
