"""What a worker holds: the plan on its part of the model, and the pages' reader."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from .. import _fingerprint, _native
from .._errors import InvalidArgumentError, NotFoundError, UnsupportedError
from .._native import LayerShape, ModelShape, Plan

PLAN_FILE = "kvmix_plan.json"  # in a model's folder
BLOCK_TOKENS = 128

logger = logging.getLogger("vllm.kvmix")  # below vLLM's, so that it is shown as its own lines are


def _folder(model: str) -> pathlib.Path | None:
    if os.path.isdir(model):
        return pathlib.Path(model)
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(model, local_files_only=True))
    except Exception:  # not in the hub's cache: the loader says what is wrong with a name
        return None


def read_plan(model: str) -> Plan:
    """KVMIX_PLAN, or the plan in the model's folder."""
    path = os.environ.get("KVMIX_PLAN")
    if path:
        return Plan.read(path)
    folder = _folder(model)
    if folder is None or not (folder / PLAN_FILE).exists():
        raise NotFoundError(
            f"kvmix.vllm: there is no plan: set KVMIX_PLAN=plan.json, or put {PLAN_FILE} into the folder of {model}"
        )
    return Plan.read(folder / PLAN_FILE)


def fingerprint(model: str, model_type: str, windows: list[int]) -> str:
    """That of kvmix.transformers.model_shape, from the weights' files; "" where the model has none of that form."""
    folder = _folder(model)
    if folder is None:
        return ""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    found: dict[int, dict[str, tuple[pathlib.Path, str]]] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                head, attention, rest = name.partition(".self_attn.")
                layer = head.rpartition(".layers.")[2] if ".layers." in head else head.removeprefix("layers.")
                if attention and layer.isdigit():
                    found.setdefault(int(layer), {})[rest] = (file, name)
    if sorted(found) != list(range(len(windows))):
        return ""

    def weights() -> Iterator[tuple[str, list[int], torch.Tensor]]:
        for layer in range(len(windows)):
            for rest, (file, name) in sorted(found[layer].items()):
                with safe_open(file, "pt") as opened:
                    part = opened.get_slice(name)
                    shape = part.get_shape()
                    width = shape[-1] if len(shape) > 1 else 1
                    yield rest, shape, part[: -(-_fingerprint.SAMPLED // width)].flatten()[: _fingerprint.SAMPLED]

    return _fingerprint.fingerprint(model_type, windows, weights())


def _refuse_configuration(config: Any) -> None:
    def refuse(what: str, remedy: str) -> None:
        raise UnsupportedError(f"kvmix.vllm: {what} is not supported; {remedy}")

    parallel = config.parallel_config
    if config.speculative_config is not None:
        refuse("speculative decoding", "leave --speculative-config out")
    if config.kv_transfer_config is not None:
        refuse("a KV connector", "leave --kv-transfer-config out")
    if getattr(config, "ec_transfer_config", None) is not None:
        refuse("an encoder connector", "leave --ec-transfer-config out")
    if parallel.pipeline_parallel_size > 1:
        refuse("pipeline parallelism", "use --tensor-parallel-size")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            refuse(name.replace("_", " "), "leave it at 1")
    if config.cache_config.block_size != BLOCK_TOKENS:
        raise InvalidArgumentError(
            f"kvmix.vllm: blocks of {config.cache_config.block_size} tokens; pages have {BLOCK_TOKENS}: "
            f"use --block-size {BLOCK_TOKENS}"
        )


def _cores() -> set[int]:
    """Those of the worker's compute threads: vLLM binds each, the one that calls us among them, to a core of its own."""
    torch.ones(1 << 20).add_(1)  # wakes them
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            mask = os.sched_getaffinity(int(thread))
        except OSError:
            continue  # it has ended meanwhile
        if len(mask) == 1:
            cores |= mask
    return cores or os.sched_getaffinity(0)


class Runtime:
    """The plan on the worker's heads. Made once all layers are there."""

    def __init__(self, config: Any, layers: dict[int, Any]) -> None:
        _refuse_configuration(config)
        model, cache = config.model_config, config.cache_config
        parts, part = config.parallel_config.tensor_parallel_size, config.parallel_config.rank
        text = model.hf_text_config
        if sorted(layers) != list(range(len(layers))):
            raise UnsupportedError(f"kvmix.vllm: attention layers are {sorted(layers)}; expected all from 0 on")
        kv_heads = model.get_total_num_kv_heads()
        shapes, windows = [], []
        for index in range(len(layers)):
            impl = layers[index].impl
            if impl.num_kv_heads != max(1, kv_heads // parts):
                raise UnsupportedError(
                    f"kvmix.vllm: layer {index} has {impl.num_kv_heads} of {kv_heads} KV heads on each of {parts} workers"
                )
            windows.append(impl.sliding_window)
            shapes.append(
                LayerShape(
                    impl.num_heads * parts, kv_heads, impl.head_size, sliding_window=impl.sliding_window, scale=impl.scale,
                    softcap=impl.softcap,
                )
            )  # fmt: skip
        self.plan = read_plan(model.model)
        self.shape = ModelShape(
            shapes, name=model.model, fingerprint=fingerprint(model.model, text.model_type, windows),
            architecture=text.model_type, context_tokens=model.max_model_len,
        )  # fmt: skip
        if self.plan.window > 0 and cache.enable_prefix_caching and any(k != "f16" or v != "f16" for k, v in self.plan.layers):
            raise UnsupportedError(
                f"kvmix.vllm: the plan keeps the newest {self.plan.window} tokens unpacked, and blocks of a cached prefix are "
                "packed: what a hit computes would not be what it stands for; make the plan with --window 0 (planner "
                "kvmix-paper: --window none), or use --no-enable-prefix-caching"
            )
        self.force = os.environ.get("KVMIX_FORCE", "") == "1"
        self.stream: Any = None
        most = config.scheduler_config.max_num_seqs
        if config.device_config.device_type == "cuda":
            self.stream = torch.cuda.current_stream()
            self.paged = _native.NativePaged(
                self.plan, self.shape, self.force, 1, most, part, parts, "cuda", self.stream.cuda_stream
            )
        else:
            self.paged = self._on_cpu(most, part, parts)
        self.most_tokens = config.scheduler_config.max_num_batched_tokens
        self._take_memory(cache, config.scheduler_config.max_num_seqs)

    def _on_cpu(self, most: int, part: int, parts: int) -> _native.NativePaged:
        cores, own = _cores(), os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            threads = min(torch.get_num_threads(), max(1, len(cores)))
            return _native.NativePaged(self.plan, self.shape, self.force, threads, most, part, parts)
        finally:
            os.sched_setaffinity(0, own)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work on pages has one stream, that of loading; vLLM computes on another, which waits for it and is waited for."""
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "kvmix.vllm: attention cannot be captured in a CUDA graph: leave cudagraph_mode to vLLM, or take PIECEWISE"
            )
        if current == self.stream:
            yield
            return
        self.stream.wait_stream(current)
        yield
        current.wait_stream(self.stream)

    def handed(self, tensor: torch.Tensor) -> Any:
        """For the library, in the order of the stream that on_stream is about."""
        return tensor if self.stream is None else tensor.__dlpack__(stream=-1)

    def _take_memory(self, cache: Any, sequences: int) -> None:
        """What lies beside the blocks comes out of what vLLM was given for its cache."""
        beside, given = self.paged.beside_bytes, cache.kv_cache_memory_bytes
        if given is None:
            raise InvalidArgumentError(
                "kvmix.vllm: say how much memory the cache has, --kv-cache-memory-bytes or VLLM_CPU_KVCACHE_SPACE (GiB): rows "
                "beside the blocks are taken out of it"
            )
        if beside >= given:
            raise InvalidArgumentError(
                f"kvmix.vllm: rows that are not packed take {beside} bytes for --max-num-seqs {sequences}, of {given} bytes in "
                "all: fewer sequences, or more memory"
            )
        cache.kv_cache_memory_bytes = given - beside
        logger.info(
            "KVmix: plan %s, %d bytes beside the blocks for %d sequences, taken out of %d; sinks of each further cached first "
            "block take %d", self.plan.note or self.plan.planner, beside, sequences, given, self.paged.sink_bytes,
        )  # fmt: skip

    def describe(self) -> str:
        return json.dumps({"kernel": self.paged.kernel, "threads": self.paged.threads, **self.paged.memory()})
