"""Command line, extraction of diffs, other formats, the Hub, pictures."""

from diffpeft.tools.plots import plot_density

__all__ = ["plot_density"]
