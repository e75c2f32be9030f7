"""The cache in an engine of one's own: two sequences, a prompt and single tokens, fork and memory. Needs NumPy alone."""

import numpy as np

import kvmix

shape = kvmix.ModelShape([kvmix.LayerShape(q_heads=8, kv_heads=2, head_dim=128)] * 4, name="mine", fingerprint="mine")
cache = kvmix.Cache(kvmix.Plan.uniform(shape, key_bits=4, value_bits=3), shape)
random = np.random.default_rng(0)


def rows(n, heads):
    return random.standard_normal((n, heads, 128), dtype=np.float32)


a = cache.create()
with cache.step([(a, 1000)]) as step:  # a prompt
    for layer in range(4):
        step.attend(layer, rows(1000, 8), rows(1000, 2), rows(1000, 2))
b = cache.fork(a)  # shares its pages
for _ in range(100):  # a token of each
    with cache.step([(a, 1), (b, 1)]) as step:
        for layer in range(4):
            out = step.attend(layer, rows(2, 8), rows(2, 2), rows(2, 2))
memory = cache.memory()
f16 = kvmix.Plan.f16(shape).bytes(shape, 1100)
print(f"{memory['tokens']} tokens in {memory['total_bytes']} bytes, kernel {cache.kernel}; one in fp16 takes {f16}")
