"""Draw the three phases of a run, for docs/method.md.

    python docs/pictures/phases.py

A network of random weights learns a toy task: ten linear classes of which only three inputs matter.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import TwoSlopeNorm
from peft import get_peft_model
from torch import nn

from diffpeft import DiffPruningConfig

SIZE, STEPS, GATING, DENSITY = 32, 600, 400, 0.02
MOMENTS = {100: "gates are open", 320: "most are closed", GATING: "pruned", STEPS: "after fixmask"}


def train() -> tuple[list[float], dict[int, torch.Tensor]]:
    """Train all phases; return the density of every step, and the diff of one matrix at each of the moments."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 10))
    inputs = torch.randn(4096, SIZE)
    labels = (inputs[:, :3] @ torch.randn(3, 10)).argmax(-1)
    config = DiffPruningConfig(target_modules=["0", "2", "4"], target_density=DENSITY)
    model = get_peft_model(base, config)
    tuner = model.base_model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    density, diffs = [], {}
    for step in range(STEPS):
        rows = torch.randint(len(inputs), (64,))
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        if tuner.phase() == "gating":
            tuner.gate_step(step, GATING)
            rate = 1e-3 * 10 ** tuner.density_progress()
        else:
            rate = 1e-2 * (STEPS - step) / (STEPS - GATING)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == GATING:
            tuner.magnitude_prune(optimizer=optimizer)
        density.append(tuner.expected_density())
        if step + 1 in MOMENTS:
            diff = torch.zeros(SIZE * SIZE)
            for positions, values in [tuner.get_diff()["0.weight"]]:
                diff[positions] = values
            diffs[step + 1] = diff.view(SIZE, SIZE)
    return density, diffs


def draw(density: list[float], diffs: dict[int, torch.Tensor], path: Path) -> None:
    """Draw the density above, and the diffs below."""
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, len(diffs), height_ratios=(1, 1.25))
    top = figure.add_subplot(grid[0, :])
    top.plot(range(1, STEPS + 1), [100 * value for value in density], color="#3b6ea5", linewidth=2)
    top.axvspan(0, GATING, color="#eef3f8", zorder=0)
    top.axvspan(GATING, STEPS, color="#f7f1e8", zorder=0)
    top.axvline(GATING, color="#b5443a", linewidth=1.5)
    top.axhline(100 * DENSITY, color="black", linewidth=0.8, linestyle=":")
    top.set(yscale="log", xlim=(0, STEPS + 4), ylim=(1, 300), xlabel="step", ylabel="expected density")
    top.set_yticks([1, 2, 10, 100], ["1%", f"{DENSITY:.0%}", "10%", "100%"])
    for x, text, side in ((GATING / 2, "1. gating", "center"), ((GATING + STEPS) / 2, "3. fixmask", "center")):
        top.text(x, 150, text, ha=side, fontsize=12)
    top.text(GATING + 4, 40, "2. pruning", color="#b5443a", fontsize=12)
    limit = max(float(diff.abs().max()) for diff in diffs.values())
    for column, (step, diff) in enumerate(diffs.items()):
        axes = figure.add_subplot(grid[1, column])
        image = axes.imshow(diff.where(diff != 0, torch.nan), cmap="RdBu", norm=TwoSlopeNorm(0, -limit / 2, limit / 2))
        share = float((diff != 0).float().mean())
        axes.set_title(f"step {step}: {MOMENTS[step]}\n{share:.1%} of this matrix", fontsize=10)
        axes.set(xticks=[], yticks=[])
        top.plot([step], [100 * density[step - 1]], "o", color="black", markersize=5)
    figure.colorbar(image, ax=figure.axes[1:], label="diff", shrink=0.8, extend="both")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("phases.png"))
    draw(*train(), parser.parse_args().output)


if __name__ == "__main__":
    main()
