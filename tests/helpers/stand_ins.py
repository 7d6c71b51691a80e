"""Small local models and data sets under the names that the documentation uses, for the tests that run its code."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hub import Hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def _tokenizer(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes; `template` frames a text, its words are special tokens and $A, $B."""
    names = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(names, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template:
        used = [(token, names[token]) for token in SPECIAL if token in template]
        pair = f"{template} $B:1 {template.split()[-1]}:1"
        tokenizer.post_processor = processors.TemplateProcessing(template, pair, used)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def _bert() -> list[Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
    words = _tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return [BertForPreTraining(BertConfig(vocab_size=len(words), **sizes)), words]


def _llama() -> list[Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
    words = _tokenizer(None, bos_token="<s>")
    words.chat_template = CHAT
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return [LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **ends)), words]


def _t5() -> list[Any]:
    words = _tokenizer("$A </s>")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return [T5ForConditionalGeneration(T5Config(vocab_size=len(words), **sizes, decoder_start_token_id=0)), words]


def _vit() -> list[Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=10, **sizes)
    return [ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 16, "width": 16})]


MODELS: dict[str, Callable[[], list[Any]]] = {
    "google-bert/bert-base-uncased": _bert,
    "sentence-transformers/all-MiniLM-L6-v2": _bert,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama,
    "google-t5/t5-small": _t5,
    "google/vit-base-patch16-224": _vit,
}
"""Repository on the Hub -> makes what it holds."""


def publish(hub: Hub) -> None:
    """Put all of the models on a stand-in of the Hub."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            for part in make():
                part.save_pretrained(scratch)
            hub.commit(name, "made here", {file.name: file.read_bytes() for file in Path(scratch).iterdir()})


def _glue() -> Iterator[dict[str, Any]]:
    for i in range(48):
        yield {"sentence1": f"the {i}th day", "sentence2": f"day {i * (i % 2)}", "label": i % 2, "idx": i}


def _reviews() -> Iterator[dict[str, Any]]:
    for i in range(48):
        yield {"text": f"number {i}: {('a good', 'a bad')[i % 2]} film", "label": i % 2}


def _questions() -> Iterator[dict[str, Any]]:
    for i in range(48):
        context = f"In year {i} the town had {2 * i + 10} houses."
        answers = {"text": [str(2 * i + 10)], "answer_start": [context.index("had ") + 4]}
        question = f"How many houses were there in year {i}?"
        yield {"id": str(i), "title": "towns", "context": context, "question": question, "answers": answers}


def _summaries() -> Iterator[dict[str, Any]]:
    for i in range(48):
        yield {"document": f"On day {i} it rained in the north, and the river rose.", "summary": "Rain.", "id": str(i)}


def _conversations() -> Iterator[dict[str, Any]]:
    for i in range(48):
        asked = {"role": "user", "content": f"What comes after {i}?"}
        yield {"messages": [asked, {"role": "assistant", "content": str(i + 1)}]}


def _images() -> Iterator[dict[str, Any]]:
    from PIL import Image

    for i in range(48):
        colour = [(200, 30, 30), (30, 200, 30), (30, 30, 200)][i % 3]
        yield {"image": Image.new("RGB", (20, 20), colour), "labels": i % 3}


DATA: dict[str, tuple[Callable[[], Iterator[dict[str, Any]]], dict[str, list[str]]]] = {
    "nyu-mll/glue": (_glue, {"label": ["not_equivalent", "equivalent"]}),
    "stanfordnlp/imdb": (_reviews, {"label": ["neg", "pos"]}),
    "rajpurkar/squad": (_questions, {}),
    "EdinburghNLP/xsum": (_summaries, {}),
    "trl-lib/Capybara": (_conversations, {}),
    "AI-Lab-Makerere/beans": (_images, {"labels": ["angular_leaf_spot", "bean_rust", "healthy"]}),
}
"""Data set on the Hub -> its rows, the same in every split, and the names of its classes."""


def load_dataset(path: str, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, but for the names that have a stand-in here."""
    import datasets

    if path not in DATA:
        return _load_dataset(path, *args, split=split, **kwargs)
    rows, classes = DATA[path]
    whole = datasets.Dataset.from_list(list(rows()))
    for column, names in classes.items():
        whole = whole.cast_column(column, datasets.ClassLabel(names=names))
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), whole))
    return splits if split is None else splits[split.split("[")[0]]


def _load_dataset(*args: Any, **kwargs: Any) -> Any:
    from datasets.load import load_dataset as original

    return original(*args, **kwargs)
