"""Prints twenty samples of the task: label, phenomenon, sentence."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/

from acceptability import make_split


def main() -> None:
    """Print the samples."""
    train, _ = make_split()
    for row in train[:20]:
        print(f"{row['label']}  {row['phenomenon']:<19} {row['sentence']}")


if __name__ == "__main__":
    main()
