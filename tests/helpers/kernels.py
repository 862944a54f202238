"""What the native kernels of this build can run."""

from __future__ import annotations

from pelton.graph.types import F16, F32, GroupQuant


def kernels_run(*types: object) -> bool:
    """Whether weights of all these types can be packed; other tests run on the reference executor only."""
    from pelton.backends.cpu import packing

    for type in types:
        if not isinstance(type, GroupQuant):
            continue
        plain = type.group_size and type.scale in (F16, F32) and not (type.floating or type.zero_point)
        if packing.VERSION == 1 and not plain:  # the first layout: integers with float scales
            return False
        try:
            packing.linear_packing(type)
        except ValueError:
            return False
    return True
