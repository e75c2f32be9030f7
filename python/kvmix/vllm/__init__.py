"""vLLM with KVmix's cache, on the CPU: a plug-in that `--attention-backend CUSTOM` turns on.

    KVMIX_PLAN=plan.json vllm serve MODEL --attention-backend CUSTOM --kv-cache-memory-bytes 2G --max-num-seqs 32

The plan is that file, or kvmix_plan.json in the model's folder. docs/vllm.md says what is taken and what is refused. vLLM finds
the two functions below by entry point; nothing of it is changed.
"""

from __future__ import annotations

VERSIONS = ("0.32",)  # of vLLM, whose interface for attention is no promise between minor releases
BACKEND = "kvmix.vllm._backend.KVmixBackend"


def register() -> None:
    """Entry point `vllm.general_plugins`: CUSTOM is KVmix's, unless another package has taken it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: vLLM's own CPU platform, which heeds CUSTOM. None on other devices."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return "kvmix.vllm._platform.KVmixCpuPlatform"
