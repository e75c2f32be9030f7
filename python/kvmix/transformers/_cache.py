"""A transformers cache that holds packed pages."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .._cache import Cache as PageCache
from .._errors import InvalidArgumentError, MismatchError, UnsupportedError
from .._native import Plan
from ._attention import HANDLE, NAME, check_compiled
from ._shape import model_shape


class KVmixLayer(CacheLayerMixin):
    """One layer's part. The rows are in the pages of the whole cache; this only hands them on to the attention function."""

    supports_early_init = False

    def __init__(self, owner: KVmixCache, index: int) -> None:
        super().__init__()
        self.owner = owner
        self.index = index
        self.shape = owner.shape.layers[index]
        self.is_sliding = self.shape.sliding_window > 0

    # Sliding layers free what their window leaves behind, so that going back may be impossible: truncate says so then. A policy
    # would take the candidates of assisted decoding, which come with the prompt, for a part of it.
    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self.is_sliding and not self.owner.policies

    @property
    def batch_size(self) -> int:
        return len(self.owner.sequences)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            check_compiled()
            return key_states, value_states
        self.owner.expect(self.index, key_states, value_states)
        self.is_initialized = True
        key = key_states.view(key_states.shape)  # a tensor of our own for the attribute
        setattr(key, HANDLE, self)
        return key, value_states

    def check(self, module: Any, scaling: float | None, window: int | None, softcap: float | None) -> None:
        """The module must compute what the cache was made for."""
        shape = self.shape
        if scaling is not None and abs(scaling - shape.scale) > 1e-5 * shape.scale:
            raise MismatchError(
                f"layer {self.index}: the model scales scores by {scaling:g}, the cache by {shape.scale:g}: "
                "make the cache from this model"
            )
        if window and window != shape.sliding_window:
            raise MismatchError(
                f"layer {self.index}: the model's sliding window is {window}, the cache's {shape.sliding_window}: "
                "make the cache from this model"
            )
        if (softcap or 0.0) != shape.softcap:
            raise MismatchError(
                f"layer {self.index}: the model's softcap is {softcap or 0.0:g}, the cache's {shape.softcap:g}: "
                "make the cache from this model"
            )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.owner.attend(self.index, query, key, value, mask)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # Earlier 5.x hands over the positions instead of their number.
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_seq_length(self, *args: Any) -> int:
        # A compiled step is one for all lengths; its positions are given, and its masks not looked at.
        return 0 if torch.compiler.is_compiling() else self.owner.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.owner.reset()

    def offload(self) -> None:
        raise UnsupportedError("a KVmixCache is not offloaded: it stays in the memory of the model's device")

    prefetch = offload

    # The owner does these for all layers at once.
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise UnsupportedError("reorder_cache is the whole KVmixCache's, not a layer's")

    crop = batch_repeat_interleave = batch_select_indices = reorder_cache  # type: ignore[assignment]


class KVmixCache(Cache):
    """`model.generate(..., past_key_values=KVmixCache(plan, model))`, or any forward pass with it.

    One cache serves one batch; `reset()` makes it empty. Rows of the batch may be padded on the left, which takes no memory.
    The cache is on the model's device, the CPU or one GPU; there it is bound to the stream that is torch's current one when it is
    made. Keys and values of any floating type are stored as the plan says. `pages` is the kvmix.Cache with the bytes that
    it takes.

    A plan's token and channel policies choose where a prompt ends. A forward pass of several tokens is a prompt, as model.generate
    makes one; prompts that come in several passes, and passes that are no prompt, are announced: `announce`. Positions, masks
    and get_seq_length() count tokens that were dropped; `pages.kept(sequences[row], layer)` has those that are left.
    """

    def __init__(
        self, plan: Plan, model: PreTrainedModel, *, force: bool = False, threads: int = 0, max_bytes: int = 0,
        kernel: str = "", exact: bool = False,
    ) -> None:  # fmt: skip
        """`force`: take another model's plan of as many layers; the rest as kvmix.Cache.

        Raises MismatchError for another model's plan, UnsupportedError for models and plans that cannot run so.
        """
        self.policies = [policy for policy in (plan.tokens, plan.channels) if policy is not None]
        self.shape = model_shape(model)
        self._config = model.config.get_text_config(decoder=True)
        self.device = model.get_input_embeddings().weight.device
        if self.device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"the model is on {self.device}; a KVmixCache is on the CPU or an NVIDIA GPU: move it there")
        options: dict[str, Any] = {}
        if self.device.type == "cuda":
            options = {"device": "cuda", "stream": torch.cuda.current_stream(self.device).cuda_stream}
        with contextlib.nullcontext() if self.device.type == "cpu" else torch.cuda.device(self.device):
            self.pages = PageCache(
                plan, self.shape, force=force, threads=threads, max_bytes=max_bytes, kernel=kernel, exact=exact, **options
            )
        self.sequences: list[int] = []
        self.seen = 0  # tokens of a row, padding included
        self._next_layer = 0
        self._rows: torch.Tensor | None = None  # of the open step, among batch x tokens: those that are no padding
        self._pad: list[int] = []  # of each row, in front of its first token
        self._known_masks: list[tuple[torch.Tensor, int]] = []
        self._given_step = False  # begin_decode opened it
        self._announced: tuple[int, bool] | None = None  # up to which length, and whether these are decoded tokens
        self._prompt_end = 0  # the length at which policies chose last
        super().__init__(layers=[KVmixLayer(self, i) for i in range(len(self.shape.layers))])

    def expect(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Checks what update is given, before anything is stored."""
        if self._config._attn_implementation != NAME:
            raise InvalidArgumentError(
                f"the model attends with '{self._config._attn_implementation}', which cannot read a KVmixCache: "
                "call kvmix.transformers.use_kvmix(model) first"
            )
        if layer == 0 and not self._given_step:
            self._abort()
        if layer != self._next_layer:
            raise InvalidArgumentError(
                f"layer {layer} came where layer {self._next_layer} is next: a KVmixCache takes a model's layers in order"
            )
        for name, tensor in (("keys", key), ("values", value)):
            if tensor.device != self.device:
                raise UnsupportedError(
                    f"layer {layer}: {name} are on {tensor.device}, the KVmixCache is on {self.device}: "
                    "make the cache once the whole model is where it runs"
                )
            if not tensor.is_floating_point():
                raise InvalidArgumentError(f"layer {layer}: {name} are {tensor.dtype}; expected a floating type")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise UnsupportedError(f"layer {layer}: a KVmixCache passes no gradients: run the model under torch.no_grad()")
        shape = self.shape.layers[layer]
        batch, heads, _, head_dim = key.shape
        if (heads, head_dim) != (shape.kv_heads, shape.head_dim) or value.shape != key.shape:
            raise MismatchError(
                f"layer {layer}: keys {tuple(key.shape)} and values {tuple(value.shape)} where the cache has "
                f"{shape.kv_heads} heads of {shape.head_dim}: make the cache from this model"
            )
        if self.sequences and len(self.sequences) != batch:
            raise InvalidArgumentError(
                f"the cache holds {len(self.sequences)} rows, the batch has {batch}: make a cache for it, or reset()"
            )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        batch, heads, tokens, head_dim = query.shape
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device).cuda_stream
            if current != self.pages.stream:
                raise InvalidArgumentError(
                    f"the current stream is {current:#x}, the cache was made on {self.pages.stream:#x}: "
                    "make and use a KVmixCache within the same torch.cuda.stream"
                )
        if not self._given_step:  # or it was opened for one token of each row, whatever masks say
            if layer == 0:
                self._begin(batch, tokens, mask)
            self._check_mask(layer, mask, batch, tokens)
        rows = [x.detach().transpose(1, 2).reshape(batch * tokens, -1, head_dim).float() for x in (query, key, value)]
        if self._rows is not None:
            rows = [x[self._rows] for x in rows]
        # After transposing a batch of single tokens has strides of its own.
        q, k, v = (x.contiguous() for x in rows)
        if self.pages.in_step:
            out = self.pages.attend(layer, q, k, v)
        else:
            out = q  # nothing but padding
        if self._rows is not None:
            padded = torch.zeros(batch * tokens, heads, head_dim, device=self.device)
            padded[self._rows] = out
            out = padded
        self._next_layer = layer + 1
        if self._next_layer == len(self.layers) and self._given_step:
            self._next_layer = 0
        elif self._next_layer == len(self.layers):
            if self.pages.in_step:
                self.pages.end_step()
            self._next_layer = 0
            self._known_masks.clear()
            self.seen += tokens
            decoded = self._announced is not None and self._announced[1]
            if self._announced is not None and self._announced[0] == self.seen:
                self._announced = None
                self._prompt_end = self._prompt_end if decoded else self.seen
            elif self._announced is None and tokens > 1:
                self._prompt_end = self.seen
        return out.reshape(batch, tokens, heads, head_dim).to(query.dtype)

    def announce(self, tokens: int, *, decoded: bool = False) -> None:
        """The next `tokens` of each row, padding included, are one prompt, in as many forward passes as they come in
        (prefill_chunk_size); or, `decoded`, they stand for tokens that were decoded one by one, as in scoring a text behind its
        prompt. Only a plan with policies wants to know, which choose at a prompt's end.

        Raises InvalidArgumentError while tokens that were announced before are still to come.
        """
        if tokens < 1:
            raise InvalidArgumentError(f"announce of {tokens} tokens; expected at least 1")
        self._abort()
        self._check_all_came("announce")
        self._announced = (self.seen + tokens, decoded)

    def _check_all_came(self, what: str) -> None:
        if self._announced is not None:
            raise InvalidArgumentError(
                f"{what} while {self._announced[0] - self.seen} of the tokens that were announced are still to come: run the "
                "model over them, or reset()"
            )

    def begin_decode(self) -> None:
        """Opens a step of one token of each row, for a loop that runs or launches the model's layers and then calls end_decode."""
        self._abort()
        if not self.sequences:
            raise InvalidArgumentError("begin_decode of an empty cache: run the model over a prompt first")
        self._check_all_came("begin_decode")
        self._rows = None
        self.pages.begin_step([(s, 1) for s in self.sequences])
        self._given_step = True

    def end_decode(self) -> None:
        self._given_step = False
        self.pages.end_step()
        self.seen += 1

    def _kind_of_pass(self, tokens: int) -> dict[str, bool]:
        """What the cache's step is told of the tokens of a forward pass."""
        end = self.seen + tokens
        if self._announced is not None:
            last, decoded = self._announced
            if end > last:
                raise InvalidArgumentError(
                    f"a forward pass of {tokens} tokens where {last - self.seen} of those that were announced are left"
                )
            return {"decoded": True} if decoded else {"more": end < last}
        if self.policies and tokens > 1 and self.seen and self._prompt_end == self.seen:
            raise InvalidArgumentError(
                f"a pass of {tokens} tokens right behind one of several, where the plan's policy {self.policies[0]} took the "
                "prompt to have ended: reset() and announce(the prompt's tokens) before its first pass, or announce(tokens, "
                "decoded=True) before this one; a second prompt is announced too"
            )
        return {}

    def _begin(self, batch: int, tokens: int, mask: torch.Tensor | None) -> None:
        kind = self._kind_of_pass(tokens)
        if not self.sequences:
            self.sequences = [self.pages.create() for _ in range(batch)]
        lengths = [self.pages.length(s) for s in self.sequences]
        self._rows = None
        if mask is None:
            for row, length in enumerate(lengths):
                if length != self.seen:
                    raise InvalidArgumentError(
                        f"row {row} was padded by {self.seen - length} tokens and now comes without an attention_mask: "
                        "pass the one of the whole row"
                    )
            counts = [tokens] * batch
        else:
            # Whether a token sees itself says whether it is one.
            if mask.ndim != 4 or mask.dtype != torch.bool or mask.shape[-2:] != (tokens, self.seen + tokens):
                raise UnsupportedError(
                    f"an attention_mask of shape {tuple(mask.shape)} and {mask.dtype} for {tokens} tokens after {self.seen}; "
                    "pass the two-dimensional one of zeros for padding, or none"
                )
            new = mask[:, 0].diagonal(self.seen, 1, 2).expand(batch, tokens)
            counts = [int(n) for n in new.sum(1)]
            for row, (length, count) in enumerate(zip(lengths, counts)):
                if length and count != tokens or not bool(new[row, tokens - count :].all()):
                    raise UnsupportedError(
                        f"row {row} is padded behind its first token: pad on the left (tokenizer.padding_side = 'left')"
                    )
            if sum(counts) < batch * tokens:
                self._rows = new.reshape(-1).nonzero().flatten()
        items = [(s, n) for s, n in zip(self.sequences, counts) if n]
        self._pad = [self.seen + tokens - length - n for length, n in zip(lengths, counts)]
        if items:
            self.pages.begin_step(items, **kind)

    def _check_mask(self, layer: int, mask: torch.Tensor | None, batch: int, tokens: int) -> None:
        """The cache computes causal attention without padding, within the layer's window: a mask must ask for just that."""
        if mask is None:
            return
        window = self.shape.layers[layer].sliding_window
        if any(known is mask and w == window for known, w in self._known_masks):
            return
        keys = torch.arange(self.seen + tokens, device=mask.device)
        queries = torch.arange(self.seen, self.seen + tokens, device=mask.device)[:, None]
        pad = torch.tensor(self._pad, device=mask.device)[:, None]
        expected = (keys <= queries)[None] & (keys >= pad)[:, None]
        if window:
            expected &= (keys > queries - window)[None]
        given = mask[:, 0].expand(batch, -1, -1)
        real = queries[:, 0] >= pad  # what padding sees is of no interest
        if mask.shape[1] != 1 or not bool(((given == expected) | ~real[:, :, None]).all()):
            raise UnsupportedError(
                f"layer {layer}: an attention_mask that is not causal with padding on the left"
                + (f" in a window of {window}" if window else "")
                + ": KVmix computes no other"
            )
        self._known_masks.append((mask, window))

    def _abort(self) -> None:
        """What a forward pass that failed has left."""
        if self.pages.in_step:
            self.pages.abort_step()
        self._given_step = False
        self._next_layer = 0
        self._known_masks.clear()

    def _replace(self, indices: list[int], share: bool = True) -> None:
        """Rows of the batch become copies of others, which share pages or do not."""
        self._abort()
        if indices == list(range(len(self.sequences))):
            return
        for index in indices:
            if not 0 <= index < len(self.sequences):
                raise InvalidArgumentError(f"row {index} of a cache of {len(self.sequences)} rows")
        copy = self.pages.fork if share else self.pages.copy
        copies: list[int] = []
        try:
            for i in indices:
                copies.append(copy(self.sequences[i]))
        except BaseException:
            for sequence in copies:
                self.pages.remove(sequence)
            raise
        for sequence in self.sequences:
            self.pages.remove(sequence)
        self.sequences = copies

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._replace([int(i) for i in beam_idx])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(len(self.sequences))[indices.cpu()]
        self._replace([int(i) for i in rows])

    def batch_repeat_interleave(self, repeats: int, *, share: bool = True) -> None:
        """`share`: rows share pages until they differ; else each has all of its own, as if it had come by itself."""
        self._replace([i for i in range(len(self.sequences)) for _ in range(repeats)], share)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -tokens_to_remove tokens; a positive number is the length to keep. What packing has lost stays
        lost, but tokens of the last step were not packed yet. Raises UnsupportedError where a sliding window has freed them,
        and where a policy has chosen by tokens that would go.
        """
        self._abort()
        keep = self.seen + tokens_to_remove if tokens_to_remove <= 0 else min(self.seen, tokens_to_remove)
        if keep < 0:
            raise InvalidArgumentError(f"crop({tokens_to_remove}) of a cache of {self.seen} tokens")
        if keep == self.seen:
            return
        self._check_all_came("crop")
        if self.policies and 0 < keep < self._prompt_end:
            raise UnsupportedError(
                f"crop to {keep} tokens: the plan's policy {self.policies[0]} chose by all {self._prompt_end} tokens up to its "
                "prompt's end, some of which are gone; reset() and start again"
            )
        # All rows or none: one may be refused.
        copies = [self.pages.fork(s) for s in self.sequences]
        try:
            for copy in copies:
                length = self.pages.length(copy)
                self.pages.truncate(copy, max(0, length - (self.seen - keep)))
        except BaseException:
            for copy in copies:
                self.pages.remove(copy)
            raise
        for sequence in self.sequences:
            self.pages.remove(sequence)
        self.sequences = copies
        self.seen = keep
        self._prompt_end = min(self._prompt_end, keep)

    def reset(self) -> None:
        self._abort()
        for sequence in self.sequences:
            self.pages.remove(sequence)
        self.sequences = []
        self.seen = 0
        self._announced = None
        self._prompt_end = 0

    def activate_past_recording(self) -> None:
        pass

    def __repr__(self) -> str:
        return f"KVmixCache({self.pages.plan!r}, {len(self.sequences)} rows of {self.seen} tokens)"
