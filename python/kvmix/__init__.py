"""KVmix: small, fast key/value caches for language models.

Measure a model once (profile), choose a configuration under a memory budget (plan), run with a cache that stores exactly that
(Cache), or say what it costs in quality (evaluate). `kvmix.transformers` runs models of the transformers library with it.
"""

from __future__ import annotations

from ._errors import (
    BudgetError,
    CancelledError,
    CorruptError,
    Error,
    FileError,
    InternalError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)

try:
    from . import _native
except ImportError as e:
    raise ImportError(
        f"kvmix: its compiled part cannot be loaded ({e}): install the package with pip, for this Python and processor"
    ) from e

from ._api import EvalRow, attend, evaluate, plan, profile
from ._cache import Cache, Step
from ._native import LayerShape, Model, ModelShape, Plan, Profile, __version__, attention_kernels, codecs, cuda_space, planners

__all__ = [
    "BudgetError",
    "Cache",
    "CancelledError",
    "CorruptError",
    "Error",
    "EvalRow",
    "FileError",
    "InternalError",
    "InvalidArgumentError",
    "LayerShape",
    "MismatchError",
    "Model",
    "ModelShape",
    "NotFoundError",
    "OutOfMemoryError",
    "Plan",
    "Profile",
    "Step",
    "UnsupportedError",
    "__version__",
    "attend",
    "attention_kernels",
    "codecs",
    "evaluate",
    "plan",
    "planners",
    "profile",
]
