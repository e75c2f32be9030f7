"""The attention function and the masks that go with it."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._errors import UnsupportedError

NAME = "kvmix"
HANDLE = "_kvmix_layer"  # attribute of the keys that KVmixCache hands out

# Within torch.compile keys carry no attribute. A Generator's compiled step says by number which cache its layers attend to.
_compiled_for = [0]
_numbered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def number_of(cache: Any) -> int:
    number = next(_numbers)
    _numbered[number] = cache
    return number


@contextlib.contextmanager
def compiled_for(number: int) -> Iterator[None]:
    _compiled_for[0] = number
    try:
        yield
    finally:
        _compiled_for[0] = 0


def check_compiled() -> None:
    """Of a layer that is being compiled."""
    if not _compiled_for[0]:
        raise UnsupportedError(
            "a model with a KVmixCache under torch.compile: run it as it is, or use kvmix.transformers.Generator(compile=...)"
        )


@torch.library.custom_op("kvmix::attend", mutates_args=())
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, number: int) -> torch.Tensor:
    cache = _numbered[number]
    cache.expect(layer, key, value)
    return cache.attend(layer, query, key, value, None)


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, number: int) -> torch.Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Over a KVmixCache where keys come from one, else PyTorch's own: other caches and training are as without KVmix.

    query: [batch, heads, tokens, head_dim]; returns [batch, tokens, heads, head_dim].
    """
    if torch.compiler.is_compiling() and _compiled_for[0]:  # options were checked in the prefill
        return _attend(query, key, value, module.layer_idx, _compiled_for[0]), None
    layer = getattr(key, HANDLE, None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise UnsupportedError(f"layer {layer.index}: dropout {dropout} with a KVmixCache; call model.eval() first")
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"layer {layer.index}: the model's attention takes {name}, which KVmix does not compute")
    layer.check(module, scaling, kwargs.get("sliding_window"), kwargs.get("softcap"))
    return layer.attend(query, key, value, attention_mask), None


def use_kvmix(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model attend through KVmix wherever it is given a KVmixCache; returns the model."""
    model.set_attn_implementation(NAME)
    return model


AttentionInterface.register(NAME, attention)
# Without a mask function of the name the model would leave padding out without a word.
AttentionMaskInterface.register(NAME, sdpa_mask)
