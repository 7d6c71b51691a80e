"""Bytes and accuracy of the quickstart's adapter by the dtype of its values.

    python examples/benchmarks/quality/value_dtypes.py              # trains it first, three minutes on two cores
    python examples/benchmarks/quality/value_dtypes.py --adapter runs/quickstart

Casts the values of copies of one trained adapter, saves each and loads it on the pretrained encoder. The bytes are
those of the file with its header and without the head; the error is that of all values together, in the 2-norm.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.quality.file_size import bytes_of_diff
from benchmarks.shared.report import markdown
from peft import PeftModel, get_peft_model
from quickstart import LEARNING_RATE, make_data, make_model, make_trainer
from torch import Tensor

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.files.encoding import VALUE_DTYPES

COLUMNS = (
    "value_dtype",
    "file bytes",
    "bits a nonzero",
    "relative error of the values",
    "held-out accuracy",
    "held-out loss",
)


def trained(steps: int) -> PeftModel:
    """The model, trained as in the quickstart."""
    model = get_peft_model(make_model(), DiffPruningConfig(task_type="SEQ_CLS"))
    callbacks = [DiffPruningCallback(gating_ratio=0.6)]
    make_trainer(model, make_data(), callbacks, max_steps=steps, learning_rate=LEARNING_RATE).train()
    return model


def values_of(model: PeftModel) -> Tensor:
    """All values of the diff in one tensor."""
    return torch.cat([values for _, values in model.base_model.get_diff().values()])


def measure(model: PeftModel, dtype: str, scratch: Path) -> list[str]:
    """The row of one dtype."""
    exact = values_of(model)
    cast = copy.deepcopy(model)
    cast.base_model.cast_values(dtype)
    cast.save_pretrained(scratch / dtype)
    size = bytes_of_diff(scratch / dtype)
    loaded = PeftModel.from_pretrained(make_model(), scratch / dtype)
    error = float((values_of(loaded) - exact).norm() / exact.norm())
    found = make_trainer(loaded, make_data(), [], disable_tqdm=True).evaluate()
    return [
        dtype,
        f"{size:,}",
        f"{8 * size / exact.numel():.2f}",
        f"{error:.1e}",
        f"{found['eval_accuracy']:.2%}",
        f"{found['eval_loss']:.4f}",
    ]


def main() -> None:
    """Measure all dtypes on one adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="a directory that quickstart.py has written; default: train it")
    parser.add_argument("--steps", type=int, default=200, help="of training, without --adapter")
    options = parser.parse_args()
    model = PeftModel.from_pretrained(make_model(), options.adapter) if options.adapter else trained(options.steps)
    with tempfile.TemporaryDirectory() as directory:
        rows = [measure(model, dtype, Path(directory)) for dtype in VALUE_DTYPES]
    print(f"{values_of(model).numel():,} nonzeros of {model.base_model.num_base_parameters():,} parameters\n")
    print(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
