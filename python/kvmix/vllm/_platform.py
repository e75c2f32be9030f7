"""vLLM's platform for CPUs passes over any backend but its own; this one takes CUSTOM where it is asked for."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class KVmixCpuPlatform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend != AttentionBackendEnum.CUSTOM:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        path = AttentionBackendEnum.CUSTOM.get_path()
        from . import BACKEND, check_version

        if path == BACKEND:
            check_version()
            from ._backend import check_selection

            check_selection(attn_selector_config)
        return path
