"""Measuring a model and looking into its memory."""
