"""Models of the transformers library with a KVmix cache.

    import kvmix
    from kvmix.transformers import KVmixCache, model_shape, use_kvmix

    use_kvmix(model)                                                  # attention that reads packed pages
    plan = kvmix.Plan.uniform(model_shape(model), key_bits=4, value_bits=4)
    model.generate(**inputs, past_key_values=KVmixCache(plan, model))

Decoder models whose layers all have full or sliding-window attention: Llama, Mistral, Qwen2, Qwen3, Gemma 3 and their like.
Left padding, beams, chunked prefill and assisted decoding work; what does not is refused with the reason.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers
except ImportError as e:
    raise ImportError(f"kvmix.transformers needs torch and transformers ({e}): pip install 'kvmix[transformers]'") from e

_version = tuple(int(part) for part in _transformers.__version__.split(".")[:2])
if not (5, 19) <= _version < (5, 40):  # which is to take past_key_values by another name
    raise ImportError(
        f"kvmix.transformers works with transformers 5.19 to 5.39, this is {_transformers.__version__}: "
        "pip install 'kvmix[transformers]'"
    )

from ._attention import use_kvmix
from ._cache import KVmixCache
from ._generator import Generator, greedy
from ._profile import profile
from ._shape import model_shape

__all__ = ["Generator", "KVmixCache", "greedy", "model_shape", "profile", "use_kvmix"]
