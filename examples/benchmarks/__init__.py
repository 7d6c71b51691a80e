"""The measurements behind the figures of README.md and docs/: speed, quality and robustness.

Each script runs by itself from the root of the repository, and puts examples/ on the path to import what is shared.
"""
