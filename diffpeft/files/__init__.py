"""Adapters and base models on disk."""

from diffpeft.files.adapter import read_adapter, write_adapter
from diffpeft.files.checkpoint import fresh_head, parameter_shapes

__all__ = ["fresh_head", "parameter_shapes", "read_adapter", "write_adapter"]
