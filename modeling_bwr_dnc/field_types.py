"""Whether values that a person wrote fit the fields of a dataclass."""

from collections.abc import Iterable
from types import NoneType
from typing import get_args, get_type_hints

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    NoneType: "null",
}


def check_types(description: dict, kind, where: str, types: Iterable[type] = WORDS) -> None:
    """Raises `ValueError` for values that do not fit their type in `kind`, as far as that is made of `types`."""
    hints = get_type_hints(kind)
    for name, value in description.items():
        allowed = get_args(hints[name]) or (hints[name],)
        if not set(allowed) <= set(types):
            continue
        is_number = float in allowed and type(value) is int
        if type(value) not in allowed and not is_number:
            rule = " or ".join(WORDS[each] for each in allowed)
            raise ValueError(f"`{name}` of {where} is {value!r}, but must be {rule}")
