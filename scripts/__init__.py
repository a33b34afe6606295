"""Command lines: `python -m scripts.<name> --help`."""

import logging

# It warns about a kernel for other machines as soon as it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
