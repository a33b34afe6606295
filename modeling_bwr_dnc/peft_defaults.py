"""Adapters for BWR-DNC without names to type: where PEFT puts LoRA and IA3, and what stays trainable beside them."""

MODEL_TYPE = "bwr_dnc"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IA3_TARGETS = ["k_proj", "v_proj", "down_proj"]
IA3_FEEDFORWARD = ["down_proj"]
# The learned parts of a memory, trained whole beside an adapter: `LoraConfig(modules_to_save=MEMORY_MODULES)`.
MEMORY_MODULES = ["salience", "routing", "compressor"]
# What 8-bit and 4-bit loading leaves alone. The memory is out of its reach anyway (its maps are no `nn.Linear`).
NOT_QUANTIZED = ["lm_head", r".*\.memory\..*"]


def register_peft_defaults() -> None:
    """Tell PEFT the target modules of `model_type` "bwr_dnc"; nothing happens without PEFT."""
    try:
        from peft.utils import constants
    except ImportError:
        return
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[MODEL_TYPE] = list(LORA_TARGETS)
    constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[MODEL_TYPE] = list(IA3_TARGETS)
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[MODEL_TYPE] = list(IA3_FEEDFORWARD)
