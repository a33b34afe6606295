"""A model under other settings of its config, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def settings_changed(model: PreTrainedModel, **settings) -> Iterator[PreTrainedModel]:
    """While this lasts, the model runs with other settings of its config; they are not validated, as controls go beyond them."""
    before = {name: getattr(model.config, name) for name in settings}
    for name, value in settings.items():
        setattr(model.config, name, value)
    try:
        yield model
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
