"""Tokenizers, chat templates, incremental detokenizer and stop strings. Imports nothing heavy."""

from .detokenize import IncrementalDetokenizer, StopStrings
from .tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

__all__ = ["IncrementalDetokenizer", "StopStrings", "Tokenizer", "load_tokenizer", "tokenizer_from_gguf"]
