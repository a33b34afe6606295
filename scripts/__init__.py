"""Command lines: `python -m scripts.<name> --help`."""
