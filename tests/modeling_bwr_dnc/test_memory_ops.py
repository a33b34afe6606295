"""The arithmetic of the bank where neither the invariants nor the reference look."""

import torch

from modeling_bwr_dnc.memory_ops import hashed_uniform


def test_hashed_numbers_fill_the_open_unit_interval_without_float64():
    """Some devices have none."""
    numbers = hashed_uniform(torch.arange(50_000).expand(1, 2, -1), seed=7)
    assert numbers.dtype == torch.float32
    assert 0 < numbers.min() < 1e-4 and 1 - 1e-4 < numbers.max() < 1
    torch.testing.assert_close(numbers.std(dim=2), torch.full((1, 2), 12**-0.5), atol=2e-3, rtol=0)
    assert abs(torch.corrcoef(numbers[0])[0, 1]) < 0.02
