from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling_bwr_dnc.texts import python_manual

TOKENIZER = Path(__file__).parent.parent.parent.parent / "tokenization" / "bwr-dnc-bpe-50k"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def manual(tokenizer):
    return tokenizer(python_manual()[:60_000], add_special_tokens=False).input_ids
