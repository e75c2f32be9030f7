"""What plans need to know of a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .._errors import UnsupportedError
from .._fingerprint import SAMPLED, fingerprint
from .._native import LayerShape, ModelShape


def _refuse(model: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(f"{type(model).__name__}: {why}: kvmix.transformers takes decoders of full or sliding attention")


def _layer_kinds(model: PreTrainedModel, config: Any) -> list[int]:
    """The sliding window of each layer, 0: none."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    for layer, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise _refuse(model, f"layer {layer} is {kind}")
        if kind == "sliding_attention" and not window:
            raise _refuse(model, f"layer {layer} is {kind} without a sliding_window in the configuration")
    return [int(window) if kind == "sliding_attention" else 0 for kind in kinds]


def _attention_modules(model: PreTrainedModel, layers: int) -> list[torch.nn.Module]:
    """Self-attention of each layer, by layer_idx."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            if index in found:
                raise _refuse(model, f"two attention modules have layer_idx {index}")
            found[index] = module
    if sorted(found) != list(range(layers)):
        raise _refuse(model, f"{len(found)} attention modules with k_proj and v_proj were found for {layers} layers")
    return [found[i] for i in range(layers)]


def _fingerprint(config: Any, modules: list[torch.nn.Module], windows: list[int]) -> str:
    """Of the weights; "" where they are not there."""
    named = [(name, weight) for module in modules for name, weight in sorted(module.named_parameters())]
    if any(weight.is_meta for _, weight in named):
        return ""
    return fingerprint(
        config.model_type, windows, ((name, weight.shape, weight.detach().flatten()[:SAMPLED]) for name, weight in named)
    )


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model's attention, with a fingerprint of its weights, for plans and caches.

    Raises UnsupportedError for models with other than full and sliding-window attention, naming the layer.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refuse(model, "it has an encoder")
    if getattr(config, "use_bidirectional_attention", None):
        raise _refuse(model, "its attention is bidirectional")
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        raise _refuse(model, "layers share keys and values")
    windows = _layer_kinds(model, config)
    modules = _attention_modules(model, len(windows))
    heads = int(config.num_attention_heads)
    layers = []
    for module, window in zip(modules, windows):
        head_dim = int(module.head_dim)
        rows, value_rows = module.k_proj.weight.shape[0], module.v_proj.weight.shape[0]
        if rows != value_rows:
            raise _refuse(model, f"keys and values differ in width ({rows} and {value_rows})")
        softcap = getattr(module, "attn_logit_softcapping", None) or 0.0
        scale = float(getattr(module, "scaling", head_dim**-0.5))
        layers.append(
            LayerShape(heads, rows // head_dim, head_dim, sliding_window=window, scale=scale, softcap=float(softcap))
        )
    return ModelShape(
        layers,
        name=getattr(config, "_name_or_path", "") or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        fingerprint=_fingerprint(config, modules, windows),
        architecture=config.model_type,
        context_tokens=int(getattr(config, "max_position_embeddings", 0) or 0),
    )
