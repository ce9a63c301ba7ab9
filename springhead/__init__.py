"""Springhead: data-centric pipelines for safe policies and safe, consistent language models."""

__version__ = "0.1.0"
