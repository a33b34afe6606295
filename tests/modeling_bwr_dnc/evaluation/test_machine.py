"""What the machine is asked: the result of a fresh process, or why there is none."""

import math
import time

import pytest

from modeling_bwr_dnc.evaluation.machine import in_fresh_process


def test_a_fresh_process_reports_its_own_failure():
    assert in_fresh_process(math.hypot, 3.0, 4.0) == 5.0
    with pytest.raises(ValueError, match="math domain error|expected a nonnegative input"):
        in_fresh_process(math.sqrt, -1.0)


def test_a_fresh_process_is_stopped_when_its_time_is_over():
    with pytest.raises(ValueError, match="sleep in a fresh process: was stopped after 0 s"):
        in_fresh_process(time.sleep, 600, timeout=0.1)
