"""A decode loop that launches captured CUDA graphs."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .._errors import InvalidArgumentError, UnsupportedError
from .._native import Plan
from ._attention import compiled_for, number_of, use_kvmix
from ._cache import KVmixCache

_CAPTURED = 4  # graphs that are kept: work lists of other lengths, mostly
_LOOK_EVERY = 16  # steps between looks at whether all rows have ended, each of which waits for the device


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


class Generator:
    """Continues prompts with a KVmixCache, as model.generate does, without what a step costs in Python.

        generator = Generator(model, plan)
        answers = generator.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=256)

    On a GPU a decode step, from token to next token, is captured as a CUDA graph and launched again by the steps after it;
    another is captured where the cache's work lists have grown, or more than one step seals pages (kvmix.Cache.launch_key). All work is on the generator's own
    stream, and the host only waits for it once in 16 steps. On the CPU steps run one by one.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, *, force: bool = False, max_bytes: int = 0, graph: bool | None = None,
        compile: str | None = None, choose: Callable[[torch.Tensor], torch.Tensor] = greedy,
    ) -> None:  # fmt: skip
        """`graph`: False runs steps one by one, True refuses models on the CPU, None: where there is a GPU. `compile`: a
        backend of torch.compile, e.g. "inductor", for a step's arithmetic but attention: fewer launches, after a compilation for
        each number of rows. `choose`: from logits [rows, vocabulary] to tokens [rows], captured too, so it must not wait for the
        device. The rest as KVmixCache.

        Raises as KVmixCache does, and UnsupportedError for rotary embeddings that depend on the length.
        """
        self.model = use_kvmix(model)
        self._device = model.get_input_embeddings().weight.device
        on_gpu = self._device.type == "cuda"
        if graph and not on_gpu:
            raise UnsupportedError(f"graph=True with a model on {self._device}: graphs are a GPU's; leave it out")
        self.graph = on_gpu if graph is None else graph
        rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        for kind in (rope, *(r for r in rope.values() if isinstance(r, dict))):
            if self.graph and kind.get("rope_type") in ("dynamic", "longrope"):
                raise UnsupportedError(
                    f"rotary embeddings of type {kind['rope_type']} change with the length, which a captured step cannot: "
                    "pass graph=False"
                )
        self.stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._choose = choose
        self._decode = torch.compile(self._logits, backend=compile, fullgraph=True, dynamic=False) if compile else self._logits
        self._graphs: OrderedDict[int, torch.cuda.CUDAGraph] = OrderedDict()
        self._queued: deque[int] = deque(maxlen=_CAPTURED)  # keys of steps that were run and not captured
        self._ran = False  # a step of this many rows ran: libraries have what they allocate at first
        self.captures = 0
        with self._on_stream():
            self.cache = KVmixCache(plan, model, force=force, max_bytes=max_bytes)
        self._number = number_of(self.cache) if compile else 0
        self._tokens = torch.empty(0, 1, dtype=torch.long, device=self._device)
        self._positions = torch.empty_like(self._tokens)
        self._ended = torch.empty(0, dtype=torch.bool, device=self._device)
        end = model.generation_config.eos_token_id
        self._end = torch.tensor([] if end is None else end, device=self._device, dtype=torch.long).flatten()
        pad = model.generation_config.pad_token_id
        self._pad = int(pad if pad is not None else self._end[0] if len(self._end) else 0)

    @contextlib.contextmanager
    def _on_stream(self) -> Any:
        if self.stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self._device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            yield
        outer.wait_stream(self.stream)

    @torch.no_grad()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, chunk: int = 2048
    ) -> torch.Tensor:
        """Forgets all rows, stores prompts [rows, tokens], `chunk` tokens at a time, and returns the first token of each answer.

        attention_mask: [rows, tokens], zeros for padding on the left.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise InvalidArgumentError(f"input_ids has shape {tuple(input_ids.shape)}; expected [rows, tokens]")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise InvalidArgumentError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, {tuple(input_ids.shape)}"
            )
        if chunk < 1:
            raise InvalidArgumentError(f"chunk is {chunk}; expected at least 1")
        with self._on_stream():
            self.cache.reset()
            input_ids = input_ids.to(self._device)
            rows, length = input_ids.shape
            self.cache.announce(length)
            positions = torch.arange(length, device=self._device).expand(rows, -1)
            if attention_mask is not None and bool(attention_mask.all()):
                attention_mask = None
            if attention_mask is not None:
                attention_mask = attention_mask.to(self._device)
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            for first in range(0, length, chunk):
                part = slice(first, min(first + chunk, length))
                logits = self._logits(
                    input_ids[:, part], positions[:, part], None if attention_mask is None else attention_mask[:, : part.stop]
                )
            self._make_room(rows)
            self._positions.copy_(positions[:, -1:] + 1)
            self._ended.zero_()
            self._take(self._choose(logits))
            return self._tokens[:, 0].clone()

    def _make_room(self, rows: int) -> None:
        if len(self._tokens) == rows:
            return
        self._tokens = torch.empty(rows, 1, dtype=torch.long, device=self._device)
        self._positions = torch.empty_like(self._tokens)
        self._ended = torch.empty(rows, dtype=torch.bool, device=self._device)
        self._graphs.clear()  # they are of the tensors before
        self._queued.clear()
        self._ran = False

    @torch.no_grad()
    def repeat(self, times: int, *, share: bool = True) -> None:
        """After prefill: as many rows of each, for several answers to a prompt. `share` as KVmixCache.batch_repeat_interleave."""
        if times < 1:
            raise InvalidArgumentError(f"times is {times}; expected at least 1")
        with self._on_stream():
            self.cache.batch_repeat_interleave(times, share=share)
            state = [x.repeat_interleave(times, 0) for x in (self._tokens, self._positions, self._ended)]
            self._make_room(len(state[0]))
            for to, rows in zip((self._tokens, self._positions, self._ended), state):
                to.copy_(rows)

    def _logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of each row's last token."""
        out = self.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]

    def _take(self, chosen: torch.Tensor) -> None:
        """The next step's tokens; rows that have ended get padding."""
        if len(self._end):
            chosen = torch.where(self._ended, self._pad, chosen)
            self._ended |= (chosen[:, None] == self._end).any(1)
        self._tokens.copy_(chosen[:, None])

    def _run(self) -> None:
        with compiled_for(self._number):
            logits = self._decode(self._tokens, self._positions)
        self._positions += 1
        self._take(self._choose(logits))

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Stores each row's token and returns the next ones, [rows], of which the next step's are a copy. Queued on `stream`, and
        overwritten by the next step."""
        with self._on_stream():
            self._step()
        return self._tokens[:, 0]

    def _step(self) -> None:
        self.cache.begin_decode()
        key = self.cache.pages.launch_key() if self.graph and self._ran else 0
        if key == 0 or (key not in self._graphs and key not in self._queued):
            # Captured is what comes again: steps that seal may come once a page.
            self._run()
            self._queued += [key] if key else []
        else:
            self._captured(key).replay()
            self.cache.pages.launched()
        self.cache.end_decode()
        self._ran = True

    def _captured(self, key: int) -> torch.cuda.CUDAGraph:
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        graph = torch.cuda.CUDAGraph()
        # None of them needs what another has left, so all share the memory of the first.
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        try:
            self._run()
        finally:
            graph.capture_end()
        if len(self._graphs) == _CAPTURED:
            self._graphs.popitem(last=False)
        self._graphs[key] = graph
        self.captures += 1
        return graph

    @torch.no_grad()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, max_new_tokens: int, chunk: int = 2048
    ) -> torch.Tensor:
        """Prompts with their answers behind them, [rows, tokens + new], until all rows have ended by a token of
        model.generation_config.eos_token_id. Rows that ended before are filled up with padding.
        """
        if max_new_tokens < 1:
            raise InvalidArgumentError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        first = self.prefill(input_ids, attention_mask, chunk=chunk)
        with self._on_stream():
            answers = torch.full((len(first), max_new_tokens), self._pad, dtype=torch.long, device=self._device)
            answers[:, 0] = first
            made = 1
            while made < max_new_tokens:
                if len(self._end) and made % _LOOK_EVERY == 0 and bool(self._ended.all()):
                    break
                self._step()
                answers[:, made] = self._tokens[:, 0]
                made += 1
            if len(self._end):
                ends = (answers[:, :made, None] == self._end).any(-1)
                lasts = torch.where(ends.any(1), ends.int().argmax(1) + 1, made)
                made = int(lasts.max())
            return torch.cat((input_ids.to(self._device), answers[:, :made]), 1)
