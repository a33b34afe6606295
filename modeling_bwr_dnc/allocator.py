"""How the C library gives memory back, on which the peak of a process depends as much as on what it holds."""

import ctypes
import sys

LARGE = 1 << 18  # bytes


def return_freed_memory() -> None:
    """
    Let the C library (glibc) give every freed tensor of `LARGE` bytes or more back to the system at once, in this process.

    By default it keeps freed blocks of up to 32 MB, scattered between those in use, and more than a third more at the peak. The price is
    page faults. `model_cards/results/training_memory_cpu_202611.md` has measurements of both.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").mallopt(threshold, LARGE)
        except OSError:
            # Another C library, which decides for itself.
            return


def trim_freed_memory() -> None:
    """Let the C library (glibc) give everything back that this process has freed, once; other libraries decide for themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
