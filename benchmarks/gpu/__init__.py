"""Pelton on a CUDA machine: does it work, and how fast is it? See ``__main__.py``."""
