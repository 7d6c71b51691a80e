"""Tiny models of many architectures, with random weights and with inputs, for the tests that sweep over them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AlbertForSequenceClassification,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    BloomForCausalLM,
    CLIPModel,
    ConvNextForImageClassification,
    DebertaV2ForSequenceClassification,
    DistilBertForSequenceClassification,
    ElectraForTokenClassification,
    Gemma3ForCausalLM,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaForCausalLM,
    MixtralForCausalLM,
    ModernBertForSequenceClassification,
    MPNetForSequenceClassification,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    ResNetForImageClassification,
    RobertaForSequenceClassification,
    SiglipModel,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperForConditionalGeneration,
    XLNetForSequenceClassification,
)

from diffpeft import DiffPruningConfig

VOCABULARY, LENGTH, PIXELS, MELS, FRAMES, SAMPLES = 60, 8, 16, 8, 12, 160


def pruned(base: PreTrainedModel, **config: object) -> PeftModel:
    """A model with a finished adapter of random values."""
    model = get_peft_model(base, DiffPruningConfig(**{"init_weights": False, "target_density": 0.05, **config}))
    model.base_model.magnitude_prune()
    return model


class Architecture(NamedTuple):
    """A model, what to feed it, and which of its parameters that leaves idle."""

    make: Callable[[], PreTrainedModel]
    """Makes the model; its weights are always the same."""
    inputs: Callable[[int], dict[str, Tensor]]
    """From a number of rows to keyword arguments of the model's forward, without labels; rows differ."""
    unused: frozenset[str] = frozenset()
    """The parameters that no output depends on: with every parameter trainable, their gradient stays None."""


def _tokens(rows: int, seed: int = 0) -> Tensor:
    # The ids below 3 are left to padding, the start and the end of a sequence.
    return torch.randint(3, VOCABULARY - 1, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _text(rows: int) -> dict[str, Tensor]:
    ids = _tokens(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_pair(rows: int) -> dict[str, Tensor]:
    segments = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(rows, -1)
    return {**_text(rows), "token_type_ids": segments}


def _text_to_text(rows: int) -> dict[str, Tensor]:
    return {**_text(rows), "decoder_input_ids": _tokens(rows, seed=1)}


def _image(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(rows, 3, PIXELS, PIXELS)}


def _text_and_image(rows: int) -> dict[str, Tensor]:
    inputs = {**_text(rows), **_image(rows)}
    # CLIP reads a text off its end, or off its first token where none is marked.
    inputs["input_ids"][:, -1] = VOCABULARY - 1
    return inputs


def _speech_to_text(rows: int) -> dict[str, Tensor]:
    return {"input_features": _noise(rows, MELS, 2 * FRAMES), "decoder_input_ids": _tokens(rows, seed=1)}


def _speech(rows: int) -> dict[str, Tensor]:
    return {"input_values": _noise(rows, SAMPLES)}


def _make(kind: type[PreTrainedModel], **config: object) -> Callable[[], PreTrainedModel]:
    """Makes a function that makes a `kind` of that configuration."""

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return kind(kind.config_class(**config))

    return make


# The usual deviation of 0.02 suits wide models: in these, signals and gradients would fade from layer to layer.
_INIT = {"initializer_range": 0.2}
_INIT_STD = {"init_std": 0.2}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_ENCODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "pad_token_id": 0, **_SIZES, **_INIT}
_DECODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, **_SPECIAL, **_SIZES, **_INIT}
_ROTARY = {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **_SPECIAL, **_INIT}
_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_SEQ2SEQ = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **_LAYERS}
_VIT = {"image_size": PIXELS, "patch_size": 8, **_SIZES}
_WAV2VEC2 = {
    **{"vocab_size": VOCABULARY, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 4)},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    # A layer that is dropped at random gets no gradient. `masked_spec_embed` is made, as `mask_time_prob` is not 0, yet
    # stays idle: what is masked would follow from NumPy's global seed.
    **{"layerdrop": 0.0, "mask_time_prob": 0.05, "apply_spec_augment": False, **_SPECIAL, **_SIZES, **_INIT},
}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_make(BertForSequenceClassification, **_ENCODER), _text_pair),
    "roberta": Architecture(_make(RobertaForSequenceClassification, **_ENCODER), _text),
    "deberta_v2": Architecture(
        _make(
            DebertaV2ForSequenceClassification,
            **{**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
            **{"position_buckets": 4, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
            **{"conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 0},
        ),
        _text,
    ),
    "albert": Architecture(_make(AlbertForSequenceClassification, **_ENCODER, embedding_size=8), _text_pair),
    "distilbert": Architecture(
        _make(
            DistilBertForSequenceClassification,
            **{"vocab_size": VOCABULARY, "max_position_embeddings": 16, **_INIT},
            **{"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        ),
        _text,
    ),
    "mpnet": Architecture(_make(MPNetForSequenceClassification, **_ENCODER), _text),
    "modernbert": Architecture(
        _make(
            ModernBertForSequenceClassification,
            **{**_DECODER, "cls_token_id": 1, "sep_token_id": 2},
            # One layer of either kind.
            **{"global_attn_every_n_layers": 2, "local_attention": 4},
        ),
        _text,
    ),
    "electra": Architecture(_make(ElectraForTokenClassification, **_ENCODER, embedding_size=8), _text_pair),
    "xlnet": Architecture(
        _make(
            XLNetForSequenceClassification,
            **{"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
            **{**_SPECIAL, **_INIT},
        ),
        _text_pair,
        unused=frozenset({"transformer.mask_emb"}),
    ),
    "gpt2": Architecture(_make(GPT2LMHeadModel, **_GPT2), _text),
    "gpt2_classifier": Architecture(_make(GPT2ForSequenceClassification, **_GPT2), _text),
    "llama": Architecture(_make(LlamaForCausalLM, **_ROTARY, tie_word_embeddings=False), _text),
    "llama_tied": Architecture(_make(LlamaForCausalLM, **_ROTARY, tie_word_embeddings=True), _text),
    "qwen3": Architecture(_make(Qwen3ForCausalLM, **_ROTARY), _text),
    "gemma3": Architecture(
        _make(
            Gemma3ForCausalLM,
            **{**_ROTARY, "query_pre_attn_scalar": 8, "sliding_window": 4},
            layer_types=["sliding_attention", "full_attention"],
        ),
        _text,
    ),
    "mixtral": Architecture(_make(MixtralForCausalLM, **_ROTARY, **_EXPERTS, num_local_experts=4), _text),
    "qwen3_moe": Architecture(
        _make(Qwen3MoeForCausalLM, **_ROTARY, **_EXPERTS, num_experts=4, moe_intermediate_size=16), _text
    ),
    "mamba": Architecture(
        _make(
            MambaForCausalLM,
            **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            **{**_SPECIAL, **_INIT},
        ),
        _text,
    ),
    # The embeddings are narrower than the layers, so projections stand between.
    "opt": Architecture(
        _make(
            OPTForCausalLM,
            **{"vocab_size": VOCABULARY, "max_position_embeddings": 16, "word_embed_proj_dim": 8, **_INIT_STD},
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, **_SPECIAL},
        ),
        _text,
    ),
    "bloom": Architecture(
        _make(BloomForCausalLM, vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, **_SPECIAL, **_INIT),
        _text,
    ),
    "t5": Architecture(
        _make(
            T5ForConditionalGeneration,
            **{"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
            **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 8},
            **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
        ),
        _text_to_text,
    ),
    "bart": Architecture(
        _make(
            BartForConditionalGeneration,
            **{**_SEQ2SEQ, **_SPECIAL, **_INIT_STD, "max_position_embeddings": 16},
            **{"decoder_start_token_id": 1, "forced_eos_token_id": None},
        ),
        _text_to_text,
    ),
    "whisper": Architecture(
        _make(
            WhisperForConditionalGeneration,
            **{**_SEQ2SEQ, **_SPECIAL, **_INIT_STD, "decoder_start_token_id": 1},
            **{"num_mel_bins": MELS, "max_source_positions": FRAMES, "max_target_positions": 16},
            **{"suppress_tokens": None, "begin_suppress_tokens": None},
        ),
        _speech_to_text,
    ),
    "wav2vec2": Architecture(
        _make(Wav2Vec2ForCTC, **_WAV2VEC2), _speech, unused=frozenset({"wav2vec2.masked_spec_embed"})
    ),
    "wav2vec2_base": Architecture(_make(Wav2Vec2Model, **_WAV2VEC2), _speech, unused=frozenset({"masked_spec_embed"})),
    "vit": Architecture(_make(ViTForImageClassification, **_VIT, **_INIT), _image),
    "convnext": Architecture(
        _make(
            ConvNextForImageClassification,
            **{"image_size": PIXELS, "patch_size": 2, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
            # At the usual 1e-6, the layers would hardly act.
            **{"layer_scale_init_value": 0.5, **_INIT},
        ),
        _image,
    ),
    "resnet": Architecture(
        _make(ResNetForImageClassification, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]), _image
    ),
    "clip": Architecture(
        _make(
            CLIPModel,
            text_config={**_DECODER, "eos_token_id": VOCABULARY - 1, "projection_dim": 8},
            vision_config={**_VIT, "projection_dim": 8},
            projection_dim=8,
        ),
        _text_and_image,
    ),
    "siglip": Architecture(_make(SiglipModel, text_config=_DECODER, vision_config=_VIT), _text_and_image),
}
