"""BWR-DNC: language models with a bounded, learned, persistent memory, compatible with Transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_bwr_dnc import BwrDncConfig
from .modeling_bwr_dnc import (
    BwrDncForCausalLM,
    BwrDncForSequenceClassification,
    BwrDncForTokenClassification,
    BwrDncModel,
    BwrDncPreTrainedModel,
)
from .state_bank import StateBankCache

AutoConfig.register("bwr_dnc", BwrDncConfig)
BwrDncConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, BwrDncModel),
    (AutoModelForCausalLM, BwrDncForCausalLM),
    (AutoModelForSequenceClassification, BwrDncForSequenceClassification),
    (AutoModelForTokenClassification, BwrDncForTokenClassification),
):
    _auto_class.register(BwrDncConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "BwrDncConfig",
    "BwrDncForCausalLM",
    "BwrDncForSequenceClassification",
    "BwrDncForTokenClassification",
    "BwrDncModel",
    "BwrDncPreTrainedModel",
    "StateBankCache",
]
