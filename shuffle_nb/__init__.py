"""Runnable papers: every core is exported from the notebook that explains it."""

__version__ = "0.1.0"
