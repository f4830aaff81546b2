"""The instructions; each file registers those of one kind when it is imported."""

from . import (  # noqa: F401
    control,
    conversions,
    floats,
    integers,
    matrices,
    movement,
    tensor_memory,
    warp_groups,
)
