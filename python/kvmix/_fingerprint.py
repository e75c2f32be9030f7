"""Of a model's attention, for plans: the same however its weights were loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

SAMPLED = 1024  # numbers of each attention weight


def fingerprint(model_type: str, windows: Sequence[int], weights: Iterable[tuple[str, Sequence[int], torch.Tensor]]) -> str:
    """Of shapes and of some weights, as bfloat16. `weights`: each one's name in its layer, shape, and first SAMPLED numbers."""
    digest = hashlib.sha256(f"{model_type} {list(windows)}".encode())
    for name, shape, numbers in weights:
        digest.update(f"{name} {tuple(shape)}".encode())
        digest.update(numbers.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
