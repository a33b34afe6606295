"""Fresh processes end with a result or a reason, and what did not fit in memory is told from other errors."""

import math
import sys
import time

import pytest
import torch

from modeling_bwr_dnc.evaluation.machine import in_fresh_process, is_out_of_memory, peak_memory, reset_peak_memory


def test_a_fresh_process_reports_its_own_failure():
    assert in_fresh_process(math.hypot, 3.0, 4.0) == 5.0
    with pytest.raises(ValueError, match="math domain error|expected a nonnegative input"):
        in_fresh_process(math.sqrt, -1.0)


def test_a_fresh_process_is_stopped_when_its_time_is_over():
    with pytest.raises(ValueError, match="sleep in a fresh process: was stopped after 0 s"):
        in_fresh_process(time.sleep, 600, timeout=0.1)


def test_what_did_not_fit_in_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.skipif(sys.platform != "linux", reason="of a process's peak only Linux can be asked to forget it")
def test_a_peak_that_was_reset_is_of_what_comes_after():
    large = torch.ones(75_000_000)
    before = peak_memory()
    del large
    assert reset_peak_memory()
    after = peak_memory()
    assert after < before - 200e6
    held = torch.ones(25_000_000)
    assert peak_memory() > after + 0.9 * held.nbytes


def test_a_peak_that_cannot_be_reset_is_said_to_be_so(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert not reset_peak_memory()
