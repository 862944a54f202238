"""How byte-level BPE vocabularies of known models cut text into words before merging.

A GGUF file names only a kind (``tokenizer.ggml.pre``); the patterns are facts about the models' own ``tokenizer.json``
files. A wrong pattern gives plausible ids and a slightly worse model, so a kind that is not in the table is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _tiktoken(digits: str, letters: str = r"\p{L}+", other: str = r"[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """The pattern of cl100k and its descendants, which differ in how they group digits and letters."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?{other}|{_SPACES}"


def _cased(digits: str, contractions: str) -> str:
    """The pattern of o200k: a word ends where lower case is followed by upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{word}{upper}*{lower}+{contractions}|{word}{upper}+{lower}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _char_class(ranges: str) -> str:
    """A character class of hexadecimal code points and ranges, separated by spaces."""
    return "[" + "".join("-".join(rf"\x{{{end}}}" for end in part.split("-")) for part in ranges.split()) + "]"


_THREE_DIGITS = r"\p{N}{1,3}"
_ONE_DIGIT = r"\p{N}"
_LLAMA3 = _tiktoken(_THREE_DIGITS)
_QWEN2 = _tiktoken(_ONE_DIGIT)
_GPT4O = _cased(_THREE_DIGITS, rf"{_CONTRACTIONS}?")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# Letters with case, of the Unicode version of that tokenizer; newer property tables have more. Code points, because
# an editor that normalizes text would turn some of these characters into others.
_DEEPSEEK_LETTERS = _char_class(
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c "
    "38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b "
    "1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 "
    "1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 "
    "2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b "
    "2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 "
    "fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df "
    "1e900-1e943"
)
_DEEPSEEK_MARKS = _char_class("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_DEEPSEEK_CJK = _char_class("4e00-9fa5 800-4e00 ac00-d7ff") + "+"


@dataclass(frozen=True)
class PreTokenizerKind:
    """splits: patterns that isolate what they match, applied one after the other.

    ignore_merges: a word that is in the vocabulary is one token, whatever the merges say.
    add_bos: what to assume where the file does not say.
    nfc: the model's tokenizer composes characters first (Unicode NFC).
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_DIGITS_THEN_GPT2 = PreTokenizerKind((_ONE_DIGIT, _GPT2))
_LLAMA3_KIND = PreTokenizerKind((_LLAMA3,), ignore_merges=True, add_bos=True)
_GPT2_KIND = PreTokenizerKind((_GPT2,))
_DEEPSEEK3_KIND = PreTokenizerKind((_THREE_DIGITS, _CJK, _DEEPSEEK3))
_BAILING = PreTokenizerKind(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)

_KINDS: dict[str, PreTokenizerKind] = {
    # What converters wrote before they told kinds apart: the rule that llama.cpp keeps for such files.
    "default": PreTokenizerKind((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        (
            "gpt-2",
            "gpt2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ),
        _GPT2_KIND,
    ),
    **dict.fromkeys(("olmo", "mpt", "modern-bert"), PreTokenizerKind((_GPT2,), nfc=True)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _DIGITS_THEN_GPT2,
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3_KIND
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizerKind((_LLAMA3,))),
    "qwen2": PreTokenizerKind((_QWEN2,), nfc=True),
    "qwen35": PreTokenizerKind((_tiktoken(_ONE_DIGIT, r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),), nfc=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        PreTokenizerKind((_QWEN2,)),
    ),
    "seed-coder": PreTokenizerKind((_tiktoken(_ONE_DIGIT, other=r"[^\s\p{L}\p{N}\r\n]+"),)),
    "minicpm5": PreTokenizerKind((_THREE_DIGITS, _tiktoken(r"\p{N}+")), ignore_merges=True),
    "deepseek-llm": PreTokenizerKind(
        ("[\r\n]", rf"\s?{_DEEPSEEK_LETTERS}+", rf"\s?{_DEEPSEEK_MARKS}+", r"\s+$", _DEEPSEEK_CJK, _ONE_DIGIT)
    ),
    "deepseek-coder": PreTokenizerKind(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _ONE_DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3_KIND),
    "falcon": PreTokenizerKind((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), PreTokenizerKind((_BLOOM,))),
    "viking": PreTokenizerKind((_BLOOM, _ONE_DIGIT)),
    "tekken": PreTokenizerKind((_cased(_ONE_DIGIT, ""),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), PreTokenizerKind((_GPT4O,))),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), PreTokenizerKind((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    "exaone-moe": PreTokenizerKind(
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
}

# These merge over whole texts with visible spaces, as sentencepiece does, and know no byte alphabet.
SENTENCEPIECE_LIKE = frozenset(("gemma4",))


def known_kinds() -> tuple[str, ...]:
    """Every value of ``tokenizer.ggml.pre`` that :func:`pre_tokenizer_kind` knows."""
    return tuple(_KINDS)


def pre_tokenizer_kind(name: str) -> PreTokenizerKind:
    """The row of a kind.

    Raises:
        TokenizerError: the kind is unknown.
    """
    try:
        return _KINDS[name]
    except KeyError:
        raise TokenizerError(
            f"the pre-tokenizer kind {name!r} (tokenizer.ggml.pre) is unknown",
            "use the safetensors checkpoint, whose tokenizer.json defines it",
        ) from None


def build_pre_tokenizer(kind: PreTokenizerKind) -> pre_tokenizers.PreTokenizer:
    """Splits, then the mapping of bytes to GPT-2's alphabet."""
    from tokenizers import Regex, pre_tokenizers

    splits: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.splits
    ]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
