"""ltx-tiny's text encoder, laid out as on Hugging Face: a T5 of two layers and its own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from tiny.captions import words
from tiny.recipe import Recipe
from tiny.training import write_whole

if TYPE_CHECKING:
    from transformers import T5EncoderModel

SPECIAL = ("<pad>", "</s>", "<unk>")  # 0, 1, 2 as in every T5

POSITION_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def tokenizer() -> Tokenizer:
    """One number for each word or mark, whatever its case; </s> ends each prompt."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words()))}
    result = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    result.normalizer = normalizers.Lowercase()
    result.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True
    )
    result.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    result.add_special_tokens(list(SPECIAL))
    return result


def encoder(recipe: Recipe, vocabulary: int) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    sizes = {key: value for key, value in recipe.text_encoder.items() if key != "max_length"}
    config = T5Config(
        vocab_size=vocabulary,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("</s>"),
        is_encoder_decoder=False,
        use_cache=False,
        architectures=["T5EncoderModel"],
        **sizes,
    )
    model = T5EncoderModel(config)
    bias = model.get_parameter(POSITION_BIAS)
    with torch.no_grad():
        bias.add_(local_heads(*bias.shape))
    return model


def local_heads(buckets: int, heads: int) -> Tensor:
    """Word order from the start: from nothing, T5 learns late that "red" belongs to "circle".

    Head 0 looks at the next word, 1 at the one before, 2 at the one before that, the others around.
    T5 counts distances 0, 1, 2, ... backwards in the first half of the buckets, then forwards.
    """
    table = torch.zeros(buckets, heads)
    for head, bucket in enumerate((buckets // 2 + 1, 1, 2)):
        table[bucket, head] = 6.0
    table[:, 3:] = -0.5 * (torch.arange(buckets) % (buckets // 2)).clamp(max=8)[:, None]
    return table


def save(model: T5EncoderModel, recipe: Recipe, folder: Path) -> None:
    """config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    weights = {
        name: value.detach().contiguous()
        for name, value in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same table as shared.weight
    }
    config = model.config.to_json_string(use_diff=False)
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": recipe.text_encoder["max_length"],
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    write_whole(
        folder / "model.safetensors",
        lambda path: save_file(weights, path, metadata={"format": "pt"}),
    )
    write_whole(folder / "config.json", lambda path: path.write_text(config, encoding="utf-8"))
    write_whole(folder / "tokenizer.json", lambda path: tokenizer().save(str(path)))
    write_whole(
        folder / "tokenizer_config.json",
        lambda path: path.write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8"),
    )
