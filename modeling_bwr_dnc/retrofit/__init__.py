"""Teaching a converted model's memory what to keep, with every weight of the source left as it is."""

from .boost import fit_attention_boost
from .compressor import fit_compressor
from .contents import fit_contents
from .facts import Fact, hide_facts, make_fact, sentence_ends
from .salience import fit_salience

__all__ = [
    "Fact",
    "fit_attention_boost",
    "fit_compressor",
    "fit_contents",
    "fit_salience",
    "hide_facts",
    "make_fact",
    "sentence_ends",
]
