"""The attention backend: packed pages in vLLM's blocks, read by the library's kernels."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from .. import _native
from .._errors import InternalError, UnsupportedError
from . import check_version
from ._runtime import BLOCK_TOKENS, Runtime


def _refuse(what: str) -> UnsupportedError:
    return UnsupportedError(f"kvmix.vllm: {what}; use vLLM's own attention, without --attention-backend CUSTOM")


def check_selection(selection: Any) -> None:
    """Raises UnsupportedError for what a layer asks for and pages cannot do."""
    for name, what in (
        ("use_mla", "latent attention (MLA)"),
        ("use_sparse", "sparse attention"),
        ("has_sink", "learned attention sinks"),
        ("use_mm_prefix", "attention to both sides over images"),
        ("use_per_head_quant_scales", "scales of a quantised cache per head"),
        ("use_non_causal", "attention that is not causal"),
        ("use_kv_connector", "a KV connector"),
        ("use_pcp", "prefill context parallelism"),
        ("use_dcp", "decode context parallelism"),
        ("use_rswa", "recurrent sliding windows"),
        ("use_batch_invariant", "batch invariance"),
        ("use_adaptive_verification", "speculative decoding"),
    ):
        if getattr(selection, name, False):
            raise _refuse(f"{what} is not supported")
    if selection.kv_cache_dtype not in (None, "auto"):
        raise UnsupportedError(
            f"kvmix.vllm: --kv-cache-dtype is {selection.kv_cache_dtype}; the plan says how the cache is stored: leave it out"
        )
    if selection.dtype not in KVmixBackend.supported_dtypes:
        raise _refuse(f"a model of {selection.dtype}")
    if selection.head_size % 16 or not 32 <= selection.head_size <= 256:
        raise _refuse(f"head size {selection.head_size}, where 32 to 256 in steps of 16 are taken")


class KVmixBackend(AttentionBackend):
    """What vLLM asks before there are layers. Each size of block has a class of its own (`of_block_bytes`)."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    block_bytes: ClassVar[int] = 0
    _by_bytes: ClassVar[dict[int, type[KVmixBackend]]] = {}

    @classmethod
    def of_block_bytes(cls, block_bytes: int) -> type[KVmixBackend]:
        if block_bytes not in cls._by_bytes:
            name = f"KVmixBackend{block_bytes}"
            cls._by_bytes[block_bytes] = type(name, (cls,), {"block_bytes": block_bytes, "__qualname__": name})
        return cls._by_bytes[block_bytes]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVmixImpl]:
        return KVmixImpl

    @staticmethod
    def get_builder_cls() -> type[KVmixMetadataBuilder]:
        return KVmixMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC)  # the first packs layers of different sizes

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, *, device_capability: Any, **asked: Any) -> list[str]:
        """Why not, for vLLM's CUDA platform; the CPU's asks check_selection."""
        try:
            check_version()
            _native.cuda_architectures()
            check_selection(types.SimpleNamespace(**asked))
        except UnsupportedError as e:
            return [str(e)]
        return []

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.state_content_bytes is not None:
            return spec
        if not cls.block_bytes:
            raise InternalError("kvmix.vllm: vLLM asked for the size of blocks before the layers were loaded")
        return dataclasses.replace(
            spec, dtype=torch.uint8, num_head_slots=1, tokens_per_state=spec.block_size, state_content_bytes=cls.block_bytes
        )


@dataclasses.dataclass
class KVmixMetadata:
    """In the CPU's memory, which cuts the work of GPUs too."""

    rows: int
    row_begin: torch.Tensor  # int32 [sequences + 1]
    lengths: torch.Tensor  # int32 [sequences], with the new rows
    table: torch.Tensor  # int32 [sequences, blocks]


class KVmixMetadataBuilder(AttentionMetadataBuilder[KVmixMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if kv_cache_spec.block_size != BLOCK_TOKENS:
            raise _refuse(f"blocks of {kv_cache_spec.block_size} tokens for {layer_names[0]}, where pages have {BLOCK_TOKENS}")

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVmixMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise _refuse("attention that is not causal")
        # Copies: vLLM writes the next step's into the same memory. Of a GPU's this waits, once a step. num_actual_tokens may be
        # rounded up to a captured graph's.
        row_begin = common.query_start_loc_cpu[: common.num_reqs + 1].to(torch.int32, copy=True)
        return KVmixMetadata(
            rows=int(row_begin[-1]),
            row_begin=row_begin,
            lengths=common.seq_lens[: common.num_reqs].to("cpu", torch.int32, copy=True),
            table=common.block_table_tensor[: common.num_reqs].to("cpu", torch.int32),
        )


class KVmixImpl(AttentionImpl):
    _runtime: ClassVar[tuple[Any, Runtime] | None] = None  # of the model that was loaded last, by its layers

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **other: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise _refuse("ALiBi is not supported")
        if attn_type != AttentionType.DECODER:
            raise _refuse(f"attention of type {attn_type} is not supported")
        if kv_sharing_target_layer_name is not None:
            raise _refuse("layers that share keys and values are not supported")
        if kv_cache_dtype != "auto":
            raise _refuse(f"a cache of type {kv_cache_dtype}")
        for name, value in other.items():
            if value is not None:
                raise _refuse(f"the layers' option {name} is not supported")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.softcap = float(scale), float(logits_soft_cap or 0.0)
        self.sliding_window = sliding_window or 0
        self.runtime: Runtime | None = None
        self.index = -1

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Before vLLM asks for the sizes of blocks: each layer learns its place in the plan, and its own."""
        config = get_current_vllm_config()
        context = config.compilation_config.static_forward_context
        if KVmixImpl._runtime is None or KVmixImpl._runtime[0] is not context:
            layers: dict[int, Any] = {}
            for name, layer in context.items():
                if not isinstance(layer, Attention) or not isinstance(layer.impl, KVmixImpl):
                    raise _refuse(f"layer {name} has state that is not KVmix's attention")
                index = extract_layer_index(name)
                if index in layers:
                    raise _refuse(f"two attention layers, {name} one of them, have the number {index}")
                layers[index] = layer
            runtime = Runtime(config, layers)
            KVmixImpl._runtime = (context, runtime)
            for index, layer in layers.items():
                layer.impl.runtime, layer.impl.index = runtime, index
                layer.attn_backend = KVmixBackend.of_block_bytes(runtime.paged.block_bytes(index))
        if self.runtime is None:
            raise InternalError("kvmix.vllm: a layer was loaded after the others")

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVmixMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise _refuse("output that is quantised")
        if attn_metadata is None:  # compilation
            return output.zero_()
        assert self.runtime is not None
        rows, runtime = attn_metadata.rows, self.runtime
        exact = output.dtype == torch.float32
        out = output[:rows] if exact else torch.empty(output[:rows].shape, dtype=torch.float32, device=output.device)
        arrays = [kv_cache, *(x[:rows].float() for x in (query, key, value)), out]
        with runtime.on_stream():
            runtime.paged.step(
                self.index, attn_metadata.row_begin, attn_metadata.lengths, attn_metadata.table, rows < runtime.most_tokens,
                *(runtime.handed(x) for x in arrays),
            )  # fmt: skip
        if not exact:
            output[:rows].copy_(out)
        return output
