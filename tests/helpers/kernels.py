"""What the native kernels of this build can run."""

from __future__ import annotations

from pelton.backends.cpu import packing


def kernels_run(*types: object) -> bool:
    """Whether weights of all these types can be packed; other tests run on the reference executor only."""
    try:
        for type in types:
            packing.linear_packing(type)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True
