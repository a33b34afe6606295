"""Which parameters of a model are its memory's."""

# In the names of the learned parts of a memory: salience, routing, compressor.
MEMORY = ".memory."


def is_memory_parameter(name: str) -> bool:
    """Whether a parameter of a model belongs to the learned parts of its memory."""
    return MEMORY in name
