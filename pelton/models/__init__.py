"""Model families, one file each; the file registers itself. See docs/add-a-model.md."""

from .registry import architectures, create

__all__ = ["architectures", "create"]
