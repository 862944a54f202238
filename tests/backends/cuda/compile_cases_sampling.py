"""Kernels of ``sampling.py`` as launches compile them: for Llama 3.1's vocabulary, and for one of a single chunk."""

_ROWS = {"logits_ptr": "*fp32", "words_ptr": "*i32", "scratch_ptr": "*i64"}
_STRIDES = {"logits_stride": "i32", "words_stride": "i32", "row_words": "i32"}
_MANY = ({"num_chunks": "i32", "CHUNKS": "constexpr", "BLOCK": "constexpr"}, {"CHUNKS": 32, "BLOCK": 4096})
_ONE = (
    {"num_chunks": "constexpr", "CHUNKS": "constexpr", "BLOCK": "constexpr"},
    {"num_chunks": 1, "CHUNKS": 1, "BLOCK": 4096},  # 1 as an argument becomes a constant
)

#: (kernel name, signature, constexprs, options)
CASES = [
    (
        "_best_kernel",
        {"logits_ptr": "*fp32", "scratch_ptr": "*i64", "vocab": "i32", "logits_stride": "i32", "row_words": "i32",
         "BLOCK": "constexpr"},
        {"BLOCK": 4096},
        {"num_warps": 8},
    ),
    *[
        (name, {**pointers, **strides, **chunks}, constants, {"num_warps": warps, "enable_fp_fusion": False})
        for chunks, constants in (_MANY, _ONE)
        for name, pointers, strides, warps in (
            ("_levels_kernel", _ROWS, {"vocab": "i32", **_STRIDES}, 4),
            ("_list_kernel", {**_ROWS, "lists_ptr": "*i32"}, {"vocab": "i32", **_STRIDES}, 8),
            (
                "_draw_kernel",
                {"tokens_ptr": "*i32", **_ROWS, "lists_ptr": "*i32"},
                {"vocab": "i32", "tokens_stride": "i32", **_STRIDES},
                16,
            ),
        )
    ],
]  # fmt: skip
