"""The attention function and the masks that go with it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._errors import UnsupportedError

NAME = "kvmix"
HANDLE = "_kvmix_layer"  # attribute of the keys that KVmixCache hands out


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
