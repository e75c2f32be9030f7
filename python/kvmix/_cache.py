"""The cache of a model's attention layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from . import _native
from ._errors import InvalidArgumentError
from ._native import ModelShape, Plan


_CUDA = 2  # DLPack's number of the kind of device
_DEFAULT_STREAM = 1  # DLPack's


def _like(array: Any, gpu: int | None) -> Any:
    """An empty array of the same kind, shape and type."""
    if hasattr(array, "new_empty"):
        return array.new_empty(array.shape)
    if gpu is not None:
        raise InvalidArgumentError(
            f"out: a {type(array).__name__} cannot make another of its kind on a GPU; pass an array of query's shape"
        )
    return np.empty(np.shape(array), np.float32)


class Step:
    """A step that is open: `attend` once for each layer, in order. Leaving the `with` block ends it; an exception undoes it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def attend(self, layer: int, query: Any, key: Any, value: Any, out: Any = None) -> Any:
        """See Cache.attend."""
        return self._cache.attend(layer, query, key, value, out)

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._cache.in_step:
                self._cache.abort_step()
            return
        try:
            self._cache.end_step()
        except BaseException:
            if self._cache.in_step:
                self._cache.abort_step()
            raise


class Cache:
    """Keys and values of any number of sequences, stored as a plan says; attention reads them packed.

    Arrays are float32 in the memory of the cache's device, the CPU's or a GPU's, and come through DLPack or the buffer protocol
    without a copy: NumPy, PyTorch (detached), CuPy and others. Rows of a step's sequences stand one after the other, in the order in which the step names them. Keys are rotated
    (post-RoPE). Threads may share a cache; their calls come one after the other.

    With device "cuda" the cache is on the thread's current GPU. All work is queued on `stream`, and what other streams have
    queued on an array before it is handed over comes first (DLPack's rule); results are there in the order of `stream`. Calls
    return before the work is done, so arrays that were made on another stream must live until it is.
    """

    def __init__(
        self,
        plan: Plan,
        shape: ModelShape,
        *,
        force: bool = False,
        threads: int = 0,
        max_bytes: int = 0,
        kernel: str = "",
        exact: bool = False,
        device: str = "cpu",
        stream: int = 0,
    ) -> None:
        """`device`: "cpu" or "cuda". `stream`: of "cuda", a cudaStream_t as an integer, which outlives the cache, e.g.
        torch.cuda.current_stream().cuda_stream; 0: the default stream. `threads`: that attend, 0: the cores that there are. `max_bytes`: limit of all pages, 0: none. `kernel`: one of
        attention_kernels(), "": the best. `exact`: no int8 products. `force`: take another model's plan of as many layers.

        Raises MismatchError for another model's plan, InvalidArgumentError for shapes and names that cannot work,
        UnsupportedError for what this build or machine has not.
        """
        digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
        self._native = _native.NativeCache(
            plan, shape, force, threads, max_bytes, kernel, exact, device, stream, f"{shape.fingerprint}+{digest}"
        )
        self.plan = plan
        self.shape = shape
        self.stream = stream
        self._gpu = self._native.gpu

    def create(self) -> int:
        """A new, empty sequence."""
        return self._native.create()

    def remove(self, sequence: int) -> None:
        """Frees a sequence. Raises NotFoundError."""
        self._native.remove(sequence)

    def fork(self, sequence: int) -> int:
        """A copy that shares full pages."""
        return self._native.fork(sequence)

    def copy(self, sequence: int) -> int:
        """A copy that shares nothing."""
        return self._native.copy(sequence)

    def truncate(self, sequence: int, tokens: int) -> None:
        """Keeps the first `tokens`. What a packed page has lost stays lost."""
        self._native.truncate(sequence, tokens)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, those that a policy dropped included."""
        return self._native.length(sequence)

    @property
    def sequences(self) -> list[int]:
        return self._native.sequences

    def step(self, items: Iterable[tuple[int, int]], *, more: bool = False, decoded: bool = False) -> Step:
        """Opens a step: (sequence, number of new tokens) of each. `more`: more of the same prompts follows; `decoded`: several
        tokens that stand for as many decoded ones (both only matter to token policies).

        Raises OutOfMemoryError before anything has changed.
        """
        self.begin_step(items, more=more, decoded=decoded)
        return Step(self)

    def begin_step(self, items: Iterable[tuple[int, int]], *, more: bool = False, decoded: bool = False) -> None:
        """As step, for callers that call end_step or abort_step themselves."""
        self._native.begin_step([(int(s), int(n)) for s, n in items], more, decoded)

    def attend(self, layer: int, query: Any, key: Any, value: Any, out: Any = None) -> Any:
        """Stores the step's keys and values of a layer and attends to all that is stored, causally.

        query, out: [rows, q_heads, head_dim]; key, value: [rows, kv_heads, head_dim]. `out` must not share memory with
        query; None: a new array of query's kind, which is returned. Raises InvalidArgumentError naming the argument.
        """
        if out is None:
            out = _like(query, self._gpu)
        arrays = (query, key, value, out) if self._gpu is None else [self._handed(x) for x in (query, key, value, out)]
        self._native.attend(layer, *arrays)
        return out

    def _handed(self, array: Any) -> Any:
        """An array of a GPU's, ready in the order of our stream."""
        if not hasattr(array, "__dlpack_device__") or array.__dlpack_device__()[0] != _CUDA:
            return array  # refused with its name
        if getattr(array, "requires_grad", False):
            return array
        return array.__dlpack__(stream=self.stream or _DEFAULT_STREAM)

    def end_step(self) -> None:
        """Makes the step final, after all layers."""
        self._native.end_step()

    def abort_step(self) -> None:
        """Undoes the open step."""
        self._native.abort_step()

    def launch_key(self) -> int:
        """On the device "cuda", between begin_step and the first layer: steps with equal keys launch the same, so that what a
        CUDA graph captured of one step's attend calls may be launched in another's place. Ask before capturing, too; the mode
        is "relaxed". 0: a step that cannot be captured, as those with prompts are.
        """
        return self._native.launch_key()

    def launched(self) -> None:
        """A captured graph stands for all layers of the open step: end_step is next."""
        self._native.launched()

    @property
    def in_step(self) -> bool:
        return self._native.in_step

    def memory(self) -> dict[str, int]:
        """Real bytes, from the allocator: sealed, open, sinks, tables, slack, scratch, and total without scratch."""
        return self._native.memory()

    def tail(self, sequence: int, layer: int) -> tuple[int, int, int]:
        """Tokens in the sinks, in packed pages, and not packed yet."""
        return self._native.tail(sequence, layer)

    def kept(self, sequence: int, layer: int) -> list[list[int]]:
        """Positions that each KV head holds."""
        return self._native.kept(sequence, layer)

    def next_seal(self, sequence: int) -> int:
        """The length at which the next step packs a page."""
        return self._native.next_seal(sequence)

    @property
    def kernel(self) -> str:
        """The attention kernels that ran, joined with '+'."""
        return self._native.kernel

    @property
    def device(self) -> str:
        """"cpu", or "cuda:" and the GPU's number."""
        return "cpu" if self._gpu is None else f"cuda:{self._gpu}"

    @property
    def threads(self) -> int:
        return self._native.threads

    @property
    def sealed_pages(self) -> int:
        """Pages packed since creation."""
        return self._native.sealed_pages

    def read(
        self, sequence: int, layer: int, kv_head: int, side: str, *, original_space: bool = True
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What is stored, as float32 [length, head_dim]; side "key" or "value". Positions that are gone are NaN."""
        return self._native.read(sequence, layer, kv_head, side, original_space)

    def save(self, sequence: int, path: str | os.PathLike[str]) -> None:
        """One sequence to a file, which only a cache of the same model and plan loads."""
        self._native.save(sequence, os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> int:
        """A new sequence from a file. Raises MismatchError for another model or plan, CorruptError for damage."""
        return self._native.load(os.fspath(path))

    def __repr__(self) -> str:
        return f"Cache({self.plan!r}, {len(self.sequences)} sequences)"


def one_layer(
    q_heads: int, kv_heads: int, head_dim: int, layers: Sequence[tuple[int, float | None, float]]
) -> ModelShape:
    """A shape without a model; a (sliding window, scale, softcap) for each layer."""
    return ModelShape(
        [
            _native.LayerShape(q_heads, kv_heads, head_dim, sliding_window=window, scale=scale, softcap=softcap)
            for window, scale, softcap in layers
        ]
    )
