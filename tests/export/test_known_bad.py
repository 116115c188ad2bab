"""Builders that are known to be bad are named when they are about to build what they break."""

import pytest

from ltx_engines.cache_key import EngineKey
from ltx_engines.targets import Flavour, Precision
from ltx_export import known_bad

BF16: tuple[Precision, ...] = ("bf16", "fp8")
FP16: tuple[Precision, ...] = ("fp16",)


def key(flavour: Flavour, version: str, stage: str, target: int) -> EngineKey:
    return EngineKey(
        stage=stage,
        graph="0" * 64,
        weights={},
        profiles=(),
        flavour=flavour,
        version=version,
        targets=(target,),
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (key("tensorrt", "11.2.1", "transformer", 90), "issue 4841"),
        (key("tensorrt", "11.2.1.6", "vae_decoder", 86), "issue 4841"),
        (key("tensorrt", "10.16.0.1", "vae_decoder", 120), "issue 17"),
    ],
)
def test_a_bad_version_is_named_with_where_that_is_known_from(bad: EngineKey, said: str) -> None:
    (sentence,) = known_bad.sentences(bad, BF16)
    assert sentence.startswith(f"{bad.stage} for SM{bad.targets[0]}: tensorrt {bad.version} ")
    assert said in sentence


@pytest.mark.parametrize(
    "good",
    [
        key("tensorrt", "11.2.10", "transformer", 90),
        key("tensorrt", "10.16.0.1", "vae_decoder", 89),
        key("tensorrt", "10.16.0.1", "transformer", 120),
        key("tensorrt-rtx", "11.2.1", "transformer", 120),
    ],
)
def test_its_neighbours_are_not(good: EngineKey) -> None:
    assert not list(known_bad.sentences(good, BF16))


def test_a_text_encoder_in_float16_is_told_what_becomes_of_its_prompts() -> None:
    text = key("tensorrt-rtx", "1.7.1", "text_encoder", 75)
    (sentence,) = known_bad.sentences(text, FP16)
    assert sentence.startswith("text_encoder for SM75: fp16 does not hold the activations of T5")
    assert not list(known_bad.sentences(text, BF16))
    others = key("tensorrt-rtx", "1.7.1", "transformer", 75)
    assert not list(known_bad.sentences(others, FP16))
