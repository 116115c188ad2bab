"""The text encoder and its tokenizer: same numbers as their makers' own code, strict reading."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from ltx_ref import unigram
from ltx_ref.checkpoint import CheckpointError
from ltx_ref.text import (
    EMBED,
    MAX_LENGTH,
    SHARED,
    PromptTokenizer,
    encode,
    load_text_encoder,
    load_tokenizer,
)

STRINGS = (
    "",
    " ",
    "a cat",
    "A Cat, in 4K!",
    "  leading and   inner    spaces  ",
    "line\nbreak\tand\ttab\r\nend\n",
    "fullwidth \uff21\uff22\uff23 and \u3000ideographic\u3000space",
    "ligature \ufb01n, superscript x\u00b2, half \u00bd, ellipsis\u2026",
    "caf\u00e9 cafe\u0301 CAF\u00c9",
    "emoji \U0001f600\U0001f680 and \u65e5\u672c\u8a9e text",
    "\u2581literal\u2581marker\u2581",
    "zero\u200bwidth, nbsp\u00a0here, soft\u00adhyphen",
    "unk\u0e01\u0e02\u0e03 \u0e01 \u0e02known",
    "\u0e01",
    "numbers 1234567890 -- !?.,;:'\"()[]{}<>@#$%^&*_+=|\\/~`",
    "extremelylongunsegmentedwordthatisnotinthevocabulary" * 3,
)


def speech(seed: int, lines: int) -> list[str]:
    """A language of syllables, some words more frequent than others, with capitals and stops."""
    pick = random.Random(seed)
    syllables = [onset + vowel for onset in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "ou")]
    words = ["".join(pick.choices(syllables, k=pick.randint(1, 4))) for _ in range(400)]
    chosen = [words[int(400 * pick.random() ** 2)] for _ in range(15 * lines)]
    return [" ".join(chosen[15 * n : 15 * n + 15]).capitalize() + "." for n in range(lines)]


CORPUS = [*speech(seed=1, lines=800), *STRINGS[2:9]]
CONFIG = T5Config(
    vocab_size=600,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
)


def mixtures(count: int, seed: int) -> list[str]:
    """Pieces of words of the corpus and of STRINGS in any order."""
    pick = random.Random(seed)
    words = " ".join((*CORPUS, *STRINGS)).split(" ")
    return ["".join(_cut(pick, word) for word in pick.choices(words, k=15)) for _ in range(count)]


def _cut(pick: random.Random, word: str) -> str:
    return word[: pick.randint(0, len(word))] + pick.choice(("", " ", "  "))


@pytest.fixture(scope="session")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small unigram model with T5's special pieces and normalization."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="trains the tests' tokenizer")
    path = tmp_path_factory.mktemp("spiece") / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=600,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return path


@pytest.fixture
def folder(tmp_path: Path, spiece: Path) -> Path:
    """A text encoder with its tokenizer beside it, as on Hugging Face."""
    torch.manual_seed(0)
    T5EncoderModel(CONFIG).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(spiece, tmp_path / "tokenizer")
    return tmp_path


def test_converted_tokenizers_give_sentencepieces_own_numbers(spiece: Path) -> None:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    ours = unigram.convert(spiece)
    for text in (*STRINGS, *mixtures(500, seed=2)):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), repr(text)
        assert ours.encode(text).ids == [*theirs.encode(text), 1]


def test_converted_tokenizers_survive_being_saved(spiece: Path, tmp_path: Path) -> None:
    unigram.convert(spiece).save(str(tmp_path / "tokenizer.json"))
    saved, converted = load_tokenizer(tmp_path), load_tokenizer(spiece.parent)
    for ours, theirs in zip(saved(STRINGS), converted(STRINGS), strict=True):
        assert torch.equal(ours, theirs)


def test_the_reader_of_the_model_file_agrees_with_protobuf(spiece: Path) -> None:
    messages = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="the yardstick")
    wanted = messages.ModelProto()
    wanted.ParseFromString(spiece.read_bytes())
    found = unigram.read_model(spiece)
    assert [(p.text, p.score, p.kind) for p in found.pieces] == [
        (p.piece, p.score, p.type) for p in wanted.pieces
    ]
    assert found.charsmap == wanted.normalizer_spec.precompiled_charsmap != b""
    assert found.model_type == wanted.trainer_spec.model_type == unigram.UNIGRAM
    assert found.add_dummy_prefix
    assert found.remove_extra_whitespaces


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="trains the tests' tokenizer")
    path = tmp_path / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=150,
            model_type="bpe",
            minloglevel=2,
        )
    with pytest.raises(CheckpointError, match="model type 2"):
        unigram.convert(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff", b"\x0a\x03\x0a\x05ab"])
def test_a_broken_model_file_costs_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*not a SentencePiece model[^\n]*$"):
        unigram.convert(path)


def test_prompts_are_closed_padded_and_cut(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(folder, max_length=12)
    long = "the river " * 20
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer(["  a cat\n", long, ""])
    assert ids.shape == mask.shape == (3, 12)
    assert ids.dtype == mask.dtype == torch.int64
    for row, keep in zip(ids, mask, strict=True):
        length = int(keep.sum())
        assert row[length - 1] == 1
        assert not row[length:].any()
        assert keep[:length].all()
    assert mask.sum(dim=1)[1:].tolist() == [12, 1]
    assert "cut to 12 tokens" in caplog.text
    assert caplog.text.count("cut") == 1


def test_the_length_is_the_original_pipelines_unless_asked(folder: Path) -> None:
    config = {"model_max_length": 512}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.max_length == MAX_LENGTH == 256
    assert tokenizer(["a cat"])[0].shape == (1, 256)
    with pytest.raises(ValueError, match="room"):
        load_tokenizer(folder, max_length=1)


@pytest.mark.parametrize("place", [".", "tokenizer", "../tokenizer"])
def test_a_tokenizer_is_found_in_the_folder_below_it_or_beside_it(
    tmp_path: Path, spiece: Path, place: str
) -> None:
    folder = tmp_path / "text_encoder"
    home = folder / place
    folder.mkdir()
    home.mkdir(exist_ok=True)
    unigram.convert(spiece).save(str(home / "tokenizer.json"))
    assert load_tokenizer(folder)(["a cat"])[1].sum() > 1


def test_a_missing_tokenizer_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or spiece\.model in .*put one"):
        load_tokenizer(tmp_path / "text_encoder")


@pytest.mark.parametrize("content", ["{}", "not JSON", "[]"])
def test_a_broken_tokenizer_costs_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*tokenizer\.json[^\n]*$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, spiece: Path) -> None:
    path = tmp_path / "tokenizer.json"
    table = json.loads(unigram.convert(spiece).to_str())
    path.write_text(json.dumps({**table, "post_processor": None}))
    with pytest.raises(CheckpointError, match="lacks </s>"):
        load_tokenizer(tmp_path)


def embeddings(model: Any) -> Tensor:
    ids = torch.arange(2, 22).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("inside", [True, False], ids=["the folder itself", "its parent"])
def test_the_loaded_encoder_is_transformers_own(tmp_path: Path, shard: str, inside: bool) -> None:
    home = tmp_path / "text_encoder"
    torch.manual_seed(1)
    saved = T5EncoderModel(CONFIG).eval()
    saved.save_pretrained(home, max_shard_size=shard)
    assert (home / "model.safetensors").is_file() == (shard == "1GB")
    ours = load_text_encoder(home if inside else tmp_path)
    assert torch.equal(embeddings(ours), embeddings(saved))
    assert torch.equal(embeddings(ours), embeddings(T5EncoderModel.from_pretrained(home)))
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_weights_take_the_type_asked_for_or_keep_the_files(folder: Path) -> None:
    assert {p.dtype for p in load_text_encoder(folder).parameters()} == {torch.float32}
    half = load_text_encoder(folder, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    wanted = torch.nn.Module.to(load_text_encoder(folder), torch.bfloat16)
    assert torch.equal(embeddings(half), embeddings(wanted))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_the_embedding_may_have_either_name_or_both(folder: Path) -> None:
    wanted = embeddings(load_text_encoder(folder))
    for names in ((SHARED,), (EMBED,), (SHARED, EMBED)):

        def rename(tensors: dict[str, Tensor], names: tuple[str, ...] = names) -> None:
            table = next(tensors.pop(name) for name in (SHARED, EMBED) if name in tensors)
            tensors.update({name: table.clone() for name in names})

        rewrite(folder, rename)
        model = load_text_encoder(folder)
        assert torch.equal(embeddings(model), wanted)
        assert model.shared.weight is model.encoder.embed_tokens.weight


def test_two_different_embeddings_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EMBED: tensors[SHARED] + 1}))
    with pytest.raises(CheckpointError, match="differ"):
        load_text_encoder(folder)


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"1 missing: {QUERY}"),
        (lambda tensors: tensors.pop(SHARED), "2 missing: encoder.embed_tokens.weight"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2)}), "lm_head.weight"),
        (lambda tensors: tensors.update({QUERY: torch.zeros(3, 4)}), r"is \[3, 4\], wanted \[32"),
    ],
    ids=["missing", "no embedding", "unexpected", "wrong shape"],
)
def test_weights_that_do_not_fit_are_named_in_one_line(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_text_encoder(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    home = folder / "text_encoder"
    (home / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_text_encoder(folder)
    (home / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"pickled.*pytorch_model\.bin.*convert"):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, r"no config\.json"), ("nonsense", "not JSON"), ('{"model_type": "umt5"}', "'umt5'")],
)
def test_a_folder_that_is_no_t5_is_refused(folder: Path, config: str | None, message: str) -> None:
    path = folder / "text_encoder" / "config.json"
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.update({QUERY: "../outside.safetensors"}), "not the name of a file"),
        (lambda places: places.update({QUERY: "model-7.safetensors"}), "not there"),
        (lambda places: places.pop(QUERY), f"{QUERY} should be in no shard"),
        (lambda places: places.update({"x": places[QUERY]}), "x should be in model.*is in none"),
        (lambda places: places.update({QUERY: places[SHARED]}), f"{QUERY} should be in model"),
        (lambda places: places.clear(), "no weight_map"),
    ],
    ids=["outside", "lost shard", "not listed", "only listed", "wrong shard", "empty"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, change: Callable[[dict[str, str]], object], message: str
) -> None:
    T5EncoderModel(CONFIG).save_pretrained(tmp_path, max_shard_size="10KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(tmp_path)


def test_padding_does_not_reach_the_text(folder: Path) -> None:
    encoder = load_text_encoder(folder)
    short, long = load_tokenizer(folder, max_length=12), load_tokenizer(folder, max_length=40)
    embeds, mask = encode(encoder, short, ["a cat"])
    longer, _ = encode(encoder, long, ["a cat"])
    assert embeds.shape == (1, 12, 32)
    words = int(mask.sum())
    torch.testing.assert_close(embeds[:, :words], longer[:, :words])
    alone = encoder(input_ids=short(["a cat"])[0][:, :words]).last_hidden_state
    torch.testing.assert_close(embeds[:, :words], alone)


def test_encoding_is_the_original_pipelines(folder: Path) -> None:
    pipelines = pytest.importorskip(
        "ltx_video.pipelines.pipeline_ltx_video", reason="the original is not installed"
    )
    from transformers import PreTrainedTokenizerFast

    encoder, tokenizer = load_text_encoder(folder), load_tokenizer(folder, max_length=16)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=unigram.convert(folder / "tokenizer" / "spiece.model"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=1000,
    )
    positive, negative = "  a red cat in the rain ", "worst quality, " * 10
    pipeline = type("Fake", (), {"text_encoder": encoder, "tokenizer": theirs})()
    for name in ("encode_prompt", "_text_preprocessing"):
        setattr(pipeline, name, getattr(pipelines.LTXVideoPipeline, name).__get__(pipeline))
    wanted = pipeline.encode_prompt(
        positive, negative_prompt=negative, device="cpu", text_encoder_max_tokens=16
    )
    embeds, mask = encode(encoder, tokenizer, [positive, negative])
    assert torch.equal(torch.cat([wanted[0], wanted[2]]), embeds)
    assert torch.equal(torch.cat([wanted[1], wanted[3]]), mask)
    assert isinstance(tokenizer, PromptTokenizer)
