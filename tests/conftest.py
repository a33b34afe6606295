"""Settings of all tests: few, repeatable examples by default, many random ones with HYPOTHESIS_PROFILE=thorough."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

_UNHURRIED = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=25, derandomize=True, **_UNHURRIED)
settings.register_profile("thorough", max_examples=150, **_UNHURRIED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def full_disk():
    """Within `with full_disk(size):` no file can grow beyond `size` bytes, as on a disk that is full."""

    @contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
