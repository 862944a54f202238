"""Kernels of ``sampling.py`` as realistic launches compile them: Llama 3.1's vocabulary, and a small one."""

_SCALARS = {"logits_stride": "i32", "words_stride": "i32", "row_words": "i32", "num_chunks": "i32"}
_ROWS = {"logits_ptr": "*fp32", "words_ptr": "*i32", "scratch_ptr": "*i64"}
_CONST = {"CHUNKS": "constexpr", "BLOCK": "constexpr"}

#: (kernel name, signature, constexprs, options)
CASES = [
    case
    for chunks, block in ((32, 4096), (1, 4096))
    for case in (
        (
            "_best_kernel",
            {"logits_ptr": "*fp32", "scratch_ptr": "*i64", "vocab": "i32", "logits_stride": "i32", "row_words": "i32",
             "BLOCK": "constexpr"},
            {"BLOCK": block},
            {"num_warps": 8},
        ),
        (
            "_levels_kernel",
            {**_ROWS, "vocab": "i32", **_SCALARS, **_CONST},
            {"CHUNKS": chunks, "BLOCK": block},
            {"num_warps": 4, "enable_fp_fusion": False},
        ),
        (
            "_list_kernel",
            {**_ROWS, "lists_ptr": "*i32", "vocab": "i32", **_SCALARS, **_CONST},
            {"CHUNKS": chunks, "BLOCK": block},
            {"num_warps": 8, "enable_fp_fusion": False},
        ),
        (
            "_draw_kernel",
            {"tokens_ptr": "*i32", **_ROWS, "lists_ptr": "*i32", "vocab": "i32", "tokens_stride": "i32", **_SCALARS,
             **_CONST},
            {"CHUNKS": chunks, "BLOCK": block},
            {"num_warps": 16, "enable_fp_fusion": False},
        ),
    )
]  # fmt: skip
