"""Metrics give numbers worked out by hand, and load as `evaluate` modules without a network."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_bwr_dnc.evaluation import metrics
from modeling_bwr_dnc.evaluation.metrics.answer_accuracy.answer_accuracy import answer_accuracy
from modeling_bwr_dnc.evaluation.metrics.loss_by_position.loss_by_position import loss_by_position

FOLDER = Path(metrics.__file__).parent


def test_answer_accuracy():
    assert answer_accuracy([[1, 2], [3], [4, 5, 6]], [[1, 2], [3], [4, 0, 6]]) == {"exact": 2 / 3, "token": 5 / 6}
    with pytest.raises(ValueError, match="an answer has 1 tokens and its reference 2"):
        answer_accuracy([[1]], [[1, 2]])
    with pytest.raises(ValueError, match="at least one"):
        answer_accuracy([], [])


def test_loss_by_position():
    """Position 0 has no loss, so the first bucket holds one token less."""
    buckets = loss_by_position([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0]], [0, 2, 4])
    assert buckets == [
        {"start": 0, "stop": 2, "loss": 2.0, "perplexity": math.exp(2.0), "tokens": 2},
        {"start": 2, "stop": 4, "loss": 2.5, "perplexity": math.exp(2.5), "tokens": 2},
        {"start": 4, "stop": 6, "loss": 4.5, "perplexity": math.exp(4.5), "tokens": 2},
    ]
    assert loss_by_position([[1.0]], [0, 64])[0]["stop"] == 2
    with pytest.raises(ValueError, match="`edges` is .* must ascend"):
        loss_by_position([[1.0]], [4, 2])


def test_they_load_offline_by_their_folders(tmp_path):
    program = f"""
import evaluate
accuracy = evaluate.load({str(FOLDER / "answer_accuracy")!r})
print(accuracy.compute(predictions=[[1, 2], [3]], references=[[1, 2], [4]]))
loss = evaluate.load({str(FOLDER / "loss_by_position")!r})
print(loss.compute(predictions=[[1.0, 2.0, 3.0]], edges=[0, 2]))
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "{'exact': 0.5, 'token': 0.66" in done.stdout and "'loss': [1.0, 2.5]" in done.stdout
