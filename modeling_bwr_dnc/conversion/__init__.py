"""Pretrained Llama-family checkpoints as BWR-DNC models, and back out to the Hub."""

from modeling_bwr_dnc.conversion.checkpoint import Conversion, convert_checkpoint
from modeling_bwr_dnc.conversion.llama_family import EqualityProof, converted_config, prove_equality, transfer_weights
from modeling_bwr_dnc.conversion.memory_adapter import adapter_budget, load_memory_adapter, save_memory_adapter
from modeling_bwr_dnc.conversion.smollm2 import obtain_smollm2
from modeling_bwr_dnc.conversion.sources import Source, load_source

__all__ = [
    "Conversion",
    "EqualityProof",
    "Source",
    "adapter_budget",
    "convert_checkpoint",
    "converted_config",
    "load_memory_adapter",
    "load_source",
    "obtain_smollm2",
    "prove_equality",
    "save_memory_adapter",
    "transfer_weights",
]
