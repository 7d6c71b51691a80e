"""Sparse diffs: their codec, arithmetic and use; knows no models."""

from diffpeft.sparse.combine import combine
from diffpeft.sparse.diff import overlap

__all__ = ["combine", "overlap"]
