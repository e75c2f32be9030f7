"""Gradient scores of a transformers model, by torch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .._errors import InvalidArgumentError
from .._native import Profile
from ._shape import _attention_modules, model_shape


class _Norms:
    """The norm of each weight's gradient as it comes, which is not kept: one weight's worth of memory at a time."""

    def __init__(self, weights: Sequence[torch.nn.Parameter]) -> None:
        self.of = [0.0] * len(weights)
        self._hooks = [w.register_post_accumulate_grad_hook(self._hook(i)) for i, w in enumerate(weights)]

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def take(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            self.of[index] = float(weight.grad.detach().float().norm())
            weight.grad = None

        return take

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def profile(
    model: PreTrainedModel,
    prompts: Sequence[str | Sequence[int] | torch.Tensor],
    tokenizer: Any = None,
    *,
    tokens: int = 512,
    progress: Callable[[float, float, str], Any] | None = None,
) -> Profile:
    """The paper's scores (KVmix, arXiv 2506.08018, b.1): per layer the Frobenius norm of the mean next-token loss' gradient
    with respect to W_k and W_v, mean over prompts. Planner "kvmix-paper" makes plans of them.

    prompts: texts, with the tokenizer, or token ids; each is cut to `tokens`. Any device and floating type; activations are
    computed again on the way back, so that memory grows with one layer's. The model is left as it was. Raises
    InvalidArgumentError for prompts of fewer than 2 tokens and losses that are not finite.
    """
    shape = model_shape(model)
    modules = _attention_modules(model, len(shape.layers))
    weights = [m.k_proj.weight for m in modules] + [m.v_proj.weight for m in modules]
    rows = [_ids(p, tokenizer, tokens, i) for i, p in enumerate(prompts)]
    if not rows:
        raise InvalidArgumentError("profile: no prompts; give at least one")
    wanted = {id(w) for w in weights}
    state = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training, checkpointing = model.training, _checkpoints(model, "is_{}_checkpointing")
    keys: list[list[float]] = []
    values: list[list[float]] = []
    norms = _Norms(weights)
    try:
        for p, _, _ in state:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        model.eval()
        if not checkpointing and model.supports_gradient_checkpointing:
            _checkpoints(model, "{}_checkpointing_enable")({"use_reentrant": False})
        for module in model.modules():  # checkpoints are for training alone, as is dropout, which stays off
            if getattr(module, "gradient_checkpointing", None) is not None:
                module.training = True
        device = model.get_input_embeddings().weight.device
        with torch.enable_grad():
            for done, ids in enumerate(rows):
                if progress is not None:
                    progress(done, len(rows), "gradients")
                ids = ids.to(device)[None]
                loss = model(ids, labels=ids, use_cache=False).loss
                if not bool(torch.isfinite(loss)):
                    raise InvalidArgumentError(
                        f"profile: the loss of prompt {done} is {float(loss)}: the model is damaged, or its type of numbers "
                        "too narrow"
                    )
                loss.backward()
                keys.append(norms.of[: len(modules)])
                values.append(norms.of[len(modules) :])
                norms.of = [0.0] * len(weights)
    finally:
        norms.close()
        if not checkpointing and model.supports_gradient_checkpointing:
            _checkpoints(model, "{}_checkpointing_disable")()
        model.train(training)
        for p, required, grad in state:
            p.requires_grad_(required)
            p.grad = grad
    return Profile.from_scores(shape, keys, values, sum(len(r) for r in rows))


def _checkpoints(model: PreTrainedModel, name: str) -> Any:
    """What a model has of that name, which 5.24 changed."""
    new = name.format("activation")
    return getattr(model, new if hasattr(model, new) else name.format("gradient"))


def _ids(prompt: Any, tokenizer: Any, tokens: int, index: int) -> torch.Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidArgumentError(f"profile: prompt {index} is text; give the tokenizer, or token ids")
        prompt = tokenizer(prompt)["input_ids"]
    ids = torch.as_tensor(prompt, dtype=torch.long).flatten()[:tokens]
    if len(ids) < 2:
        raise InvalidArgumentError(f"profile: prompt {index} has {len(ids)} tokens; expected at least 2")
    return ids
