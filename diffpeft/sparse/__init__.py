"""Sparse diffs: positions, in-place updates, autograd, top-k, combining."""
