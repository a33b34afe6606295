"""Settings of all tests: few, repeatable examples by default, many random ones with HYPOTHESIS_PROFILE=thorough."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

_UNHURRIED = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=25, derandomize=True, **_UNHURRIED)
settings.register_profile("thorough", max_examples=150, **_UNHURRIED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
