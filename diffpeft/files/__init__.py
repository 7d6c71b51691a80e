"""Adapters and base models on disk."""
