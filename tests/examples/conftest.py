"""What the tests of examples/ share: the scripts' own import path, and a tokenizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from squad_data import LETTERS, WORDS
from transformers import BertTokenizerFast


@pytest.fixture(scope="session")
def squad_tokenizer(tmp_path_factory):
    """Whole words where it knows them, letters where not."""
    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, ".", ",", "?", "'"]))
    return BertTokenizerFast(vocab=str(file))
