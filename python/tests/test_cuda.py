"""kvmix.Cache on a GPU, with tensors of torch's: against torch's own attention and the same cache on the CPU."""

import numpy as np
import pytest
from conftest import device_or_skip, why_no_gpu

import kvmix

torch = pytest.importorskip("torch", reason="tensors on a GPU need torch")

HEADS, KV_HEADS = 8, 2


@pytest.fixture(scope="module", autouse=True)
def gpu():
    device_or_skip("cuda")


def shape(head_dim=128):
    layers = [
        kvmix.LayerShape(HEADS, KV_HEADS, head_dim),
        kvmix.LayerShape(HEADS, KV_HEADS, head_dim, sliding_window=200, scale=0.1, softcap=30.0),
    ]
    return kvmix.ModelShape(layers, name="two layers", fingerprint="two")


class Rows:
    """Random rows of steps, all of which are kept; the same for each that asks with the same seed."""

    def __init__(self, head_dim, seed=1):
        self.random = torch.Generator().manual_seed(seed)
        self.dim = head_dim
        self.keys, self.values = ([], []), ([], [])

    def of(self, layer, n):
        q, k, v = (torch.randn(n, heads, self.dim, generator=self.random) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.keys[layer].append(k)
        self.values[layer].append(v)
        return q, k, v


def exact(q, k, v, layer):
    """Causal attention of the last queries, in double precision."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = distance < 0
    if layer.sliding_window:
        hidden |= distance >= layer.sliding_window
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def feed(cache, sequence, rows, sizes, place):
    """Steps of so many tokens; yields (layer, queries, output) on the CPU."""
    for n in sizes:
        with cache.step([(sequence, n)]) as step:
            for layer in range(2):
                q, k, v = rows.of(layer, n)
                yield layer, q, step.attend(layer, place(q), place(k), place(v)).cpu()


@pytest.mark.parametrize("head_dim, bits, tolerance", [(128, 16, 4e-3), (64, 16, 4e-3), (128, 8, 5e-2), (128, 4, 0.6)])
def test_attention_equals_torchs(head_dim, bits, tolerance):
    model = shape(head_dim)
    cache = kvmix.Cache(kvmix.Plan.uniform(model, bits, bits), model, device="cuda")
    assert cache.device == f"cuda:{torch.cuda.current_device()}"
    rows, sequence = Rows(head_dim), cache.create()
    for layer, q, out in feed(cache, sequence, rows, [300, 1, 1, 130, 1, 1], torch.Tensor.cuda):
        k, v = torch.cat(rows.keys[layer]), torch.cat(rows.values[layer])
        assert (out - exact(q, k, v, model.layers[layer])).abs().max() < tolerance
    assert cache.length(sequence) == 434
    assert cache.tail(sequence, 0)[1] == (0 if bits == 16 else 384)


def test_pages_are_the_cpus():
    """What is stored is equal, and attention to it within arithmetic."""
    model = shape()
    plan = kvmix.Plan.uniform(model, 3, 2)
    caches = kvmix.Cache(plan, model, device="cuda"), kvmix.Cache(plan, model, threads=1, exact=True)
    sequences = [cache.create() for cache in caches]
    outs = []
    for cache, sequence, place in zip(caches, sequences, (torch.Tensor.cuda, lambda x: x)):
        outs.append([out for _, _, out in feed(cache, sequence, Rows(128), [512, 1, 1, 128, 1], place)])
    for device, cpu in zip(*outs):  # whose products are of bf16
        assert (device - cpu).pow(2).mean().sqrt() < 0.02 * cpu.std()
    stored = [cache.read(s, 0, 1, "key", original_space=False) for cache, s in zip(caches, sequences)]
    assert np.array_equal(*stored)
    copy = caches[0].copy(sequences[0])
    assert np.array_equal(caches[0].read(copy, 0, 1, "key", original_space=False), stored[0])


def test_rows_are_taken_where_they_are():
    """Parts of a larger tensor, on a stream of one's own, into a tensor of one's own."""
    model = shape()
    stream = torch.cuda.Stream()
    cache = kvmix.Cache(kvmix.Plan.f16(model), model, device="cuda", stream=stream.cuda_stream)
    rows = Rows(128)
    with cache.step([(cache.create(), 7)]):
        for layer in range(2):
            q, k, v = rows.of(layer, 7)
            packed = torch.cat([q, k, v], 1).cuda()  # by the default stream, which ours must wait for
            out = torch.full((7, HEADS, 128), torch.nan, device="cuda")
            parts = packed.split([HEADS, KV_HEADS, KV_HEADS], 1)
            assert cache.attend(layer, *parts, out=out) is out
            stream.synchronize()
            assert (out.cpu() - exact(q, k, v, model.layers[layer])).abs().max() < 4e-3


def test_a_captured_step_is_launched_again():
    model = shape()
    plan = kvmix.Plan.uniform(model, 2, 2)
    stream = torch.cuda.Stream()
    want = []
    cache = kvmix.Cache(plan, model, device="cuda")
    for _, _, out in feed(cache, cache.create(), Rows(128), [300] + [1] * 150, torch.Tensor.cuda):
        want.append(out)
    with torch.cuda.stream(stream):
        cache = kvmix.Cache(plan, model, device="cuda", stream=stream.cuda_stream)
        rows, sequence = Rows(128), cache.create()
        given = [out for _, _, out in feed(cache, sequence, rows, [300, 1], torch.Tensor.cuda)]
        q, k, v = (torch.zeros(2, 1, heads, 128, device="cuda") for heads in (HEADS, KV_HEADS, KV_HEADS))
        out = torch.zeros_like(q)
        graphs = {}
        for _ in range(149):
            for layer in range(2):
                for to, row in zip((q, k, v), rows.of(layer, 1)):
                    to[layer].copy_(row)
            cache.begin_step([(sequence, 1)])
            key = cache.launch_key()
            assert key != 0
            if key not in graphs:
                graphs[key] = torch.cuda.CUDAGraph()
                graphs[key].capture_begin(capture_error_mode="relaxed")
                for layer in range(2):
                    cache.attend(layer, q[layer], k[layer], v[layer], out[layer])
                graphs[key].capture_end()
            graphs[key].replay()
            cache.launched()
            cache.end_step()
            given += list(out.cpu())
    assert len(graphs) < 8
    assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


def test_what_cannot_work_is_refused():
    model = shape()
    cache = kvmix.Cache(kvmix.Plan.f16(model), model, device="cuda")
    sequence = cache.create()
    q, k, v = Rows(128).of(0, 1)
    with cache.step([(sequence, 1)]) as step:
        with pytest.raises(kvmix.InvalidArgumentError, match="key is not in the memory of GPU 0"):
            step.attend(0, q.cuda(), k, v.cuda())
        with pytest.raises(kvmix.InvalidArgumentError, match="out: a ndarray cannot"):
            step.attend(0, q.numpy(), k.cuda(), v.cuda())
        with pytest.raises(kvmix.InvalidArgumentError, match="value is not float32"):
            step.attend(0, q.cuda(), k.cuda(), v.cuda().half())
        with pytest.raises(kvmix.InvalidArgumentError, match="query has shape"):
            step.attend(0, q.cuda()[:, :4], k.cuda(), v.cuda())
        with pytest.raises(kvmix.InvalidArgumentError, match="out shares memory"):
            both = q.cuda()
            step.attend(0, both, k.cuda(), v.cuda(), out=both)
        for layer in range(2):
            step.attend(layer, q.cuda(), k.cuda(), v.cuda())
    with pytest.raises(kvmix.InvalidArgumentError, match="launch_key"):
        cache.launch_key()
    odd = kvmix.ModelShape([kvmix.LayerShape(2, 1, 80)])
    with pytest.raises(kvmix.UnsupportedError, match="head_dim 80"):
        kvmix.Cache(kvmix.Plan.f16(odd), odd, device="cuda")


def test_the_gpu_says_its_memory():
    free, total = kvmix.cuda_space()
    assert 0 < free <= total and why_no_gpu() == ""
