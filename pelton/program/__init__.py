"""Programs: what a backend runs."""

from .lower import lower
from .memory import plan_memory
from .program import (
    AdapterRef,
    AdapterTable,
    Buffer,
    CacheRef,
    Call,
    Constant,
    ConstantRef,
    InputRef,
    Operand,
    Program,
    View,
)
from .text import constant_text, parse_program, print_program

__all__ = [
    "AdapterRef", "AdapterTable", "Buffer", "CacheRef", "Call", "Constant", "ConstantRef", "InputRef", "Operand",
    "Program", "View", "constant_text", "lower", "parse_program", "plan_memory", "print_program",
]  # fmt: skip
