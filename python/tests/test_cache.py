import numpy as np
import pytest
from conftest import why_no_gpu

import kvmix

RANDOM = np.random.default_rng(1)
SHAPE = kvmix.ModelShape(
    [kvmix.LayerShape(6, 2, 64), kvmix.LayerShape(6, 2, 64, sliding_window=200, scale=0.2, softcap=30.0)],
    name="two layers",
    fingerprint="two",
)


def rows(n, heads):
    return RANDOM.standard_normal((n, heads, 64)).astype(np.float32)


def exact(q, k, v, layer, start):
    """Causal attention of queries from position `start` on, in double precision."""
    k = np.repeat(k, layer.q_heads // layer.kv_heads, 1).astype(np.float64)
    v = np.repeat(v, layer.q_heads // layer.kv_heads, 1).astype(np.float64)
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    distance = np.arange(start, start + len(q))[:, None] - np.arange(len(k))
    hidden = distance < 0
    if layer.sliding_window:
        hidden |= distance >= layer.sliding_window
    scores[:, hidden] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)


def feed(cache, sequence, sizes, keep):
    """Steps of so many tokens; keeps all rows; yields what each layer's attention gave."""
    for n in sizes:
        with cache.step([(sequence, n)]) as step:
            for layer in range(2):
                q, k, v = rows(n, 6), rows(n, 2), rows(n, 2)
                keep[layer][0].append(k)
                keep[layer][1].append(v)
                yield layer, q, step.attend(layer, q, k, v)


@pytest.mark.parametrize("bits, tolerance", [(16, 2e-3), (8, 4e-2), (4, 0.6)])
def test_attention_equals_double_precision_over_what_is_stored(bits, tolerance):
    cache = kvmix.Cache(kvmix.Plan.uniform(SHAPE, bits, bits), SHAPE, threads=2, exact=True)
    sequence = cache.create()
    keep = [([], []), ([], [])]
    for layer, q, out in feed(cache, sequence, [300, 1, 1, 130, 1, 1], keep):
        k, v = (np.concatenate(side) for side in keep[layer])
        want = exact(q, k, v, SHAPE.layers[layer], len(k) - len(q))
        assert np.abs(out - want).max() < tolerance
    assert cache.length(sequence) == 434
    assert cache.tail(sequence, 0)[1] == (0 if bits == 16 else 384)
    # Over what is stored there is no loss but the arithmetic's.
    with cache.step([(sequence, 1)]) as step:
        q, k, v = rows(1, 6), rows(1, 2), rows(1, 2)
        outs = [step.attend(layer, q, k, v) for layer in range(2)]
    for layer, out in enumerate(outs):
        stored = [
            np.stack([cache.read(sequence, layer, head, side) for head in range(2)], 1) for side in ("key", "value")
        ]
        window = SHAPE.layers[layer].sliding_window
        if window:  # what the window left behind is gone
            assert np.isnan(stored[0][20]).all()
            stored = [np.where(np.isnan(side), 0, side) for side in stored]
        want = exact(q, *stored, SHAPE.layers[layer], 434)
        assert np.abs(out - want).max() < 5e-3


def test_sequences_fork_and_are_cut_as_if_each_were_alone():
    cache = kvmix.Cache(kvmix.Plan.uniform(SHAPE, 4, 4), SHAPE, threads=1)
    a = cache.create()
    keep = [([], []), ([], [])]
    for _ in feed(cache, a, [150, 30], keep):
        pass
    b = cache.fork(a)
    q, k, v = rows(2, 6), rows(2, 2), rows(2, 2)
    with cache.step([(a, 1), (b, 1)]) as step:
        twice = [step.attend(layer, np.repeat(q[:1], 2, 0), np.repeat(k[:1], 2, 0), np.repeat(v[:1], 2, 0)) for layer in (0, 1)]
    for out in twice:
        assert (out[0] == out[1]).all()
    cache.truncate(b, 180)
    with cache.step([(b, 1)]) as step:
        again = [step.attend(layer, q[:1], k[:1], v[:1]) for layer in (0, 1)]
    for first, second in zip(twice, again):
        np.testing.assert_array_equal(first[0], second[0])
    assert cache.sequences == [a, b] and cache.length(a) == cache.length(b) == 181
    cache.remove(a)
    with pytest.raises(kvmix.NotFoundError, match=str(a)):
        cache.length(a)


def test_a_file_holds_a_sequence_of_the_same_plan(tmp_path):
    plan = kvmix.Plan.uniform(SHAPE, 3, 3)
    cache = kvmix.Cache(plan, SHAPE)
    a = cache.create()
    for _ in feed(cache, a, [400], [([], []), ([], [])]):
        pass
    cache.save(a, tmp_path / "a.kvmix")
    b = cache.load(tmp_path / "a.kvmix")
    for layer in (0, 1):
        np.testing.assert_array_equal(cache.read(a, layer, 1, "key"), cache.read(b, layer, 1, "key"))
    other = kvmix.Cache(kvmix.Plan.uniform(SHAPE, 4, 3), SHAPE)
    with pytest.raises(kvmix.MismatchError):
        other.load(tmp_path / "a.kvmix")
    damaged = bytearray((tmp_path / "a.kvmix").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "b.kvmix").write_bytes(damaged)
    with pytest.raises(kvmix.CorruptError, match="b.kvmix"):
        cache.load(tmp_path / "b.kvmix")


def test_memory_is_real_and_limited():
    plan = kvmix.Plan.uniform(SHAPE, 2, 2)
    cache = kvmix.Cache(plan, SHAPE)
    a = cache.create()
    for _ in feed(cache, a, [128] * 10, [([], []), ([], [])]):
        pass
    memory = cache.memory()
    parts = sum(memory[f"{part}_bytes"] for part in ("sealed", "open", "sink", "table", "slack"))
    assert memory["total_bytes"] == parts and memory["tokens"] == 1280
    assert plan.bytes(SHAPE, 1280) <= memory["total_bytes"] + 4096
    small = kvmix.Cache(plan, SHAPE, max_bytes=200_000)
    b = small.create()
    with pytest.raises(kvmix.OutOfMemoryError, match="200000") as full:
        for _ in feed(small, b, [128] * 20, [([], []), ([], [])]):
            pass
    assert isinstance(full.value, MemoryError)
    assert not small.in_step and 0 < small.length(b) < 1280
    small.remove(b)
    for _ in feed(small, small.create(), [128], [([], []), ([], [])]):  # and goes on
        pass


def open_step(cache, n=3):
    sequence = cache.create()
    cache.begin_step([(sequence, n)])
    return sequence


def test_wrong_arrays_are_refused_by_name():
    cache = kvmix.Cache(kvmix.Plan.f16(SHAPE), SHAPE)
    q, k, v = rows(3, 6), rows(3, 2), rows(3, 2)
    with pytest.raises(kvmix.InvalidArgumentError, match="no step is open"):
        cache.attend(0, q, k, v)
    sequence = open_step(cache)
    with pytest.raises(kvmix.InvalidArgumentError, match=r"key has shape \[2, 2, 64\].*\[3, 2, 64\]"):
        cache.attend(0, q, k[:2], v)
    with pytest.raises(kvmix.InvalidArgumentError, match="value is not float32"):
        cache.attend(0, q, k, v.astype(np.float64))
    with pytest.raises(kvmix.InvalidArgumentError, match="query has rows that are not contiguous"):
        cache.attend(0, np.ascontiguousarray(q.transpose(0, 2, 1)).transpose(0, 2, 1), k, v)
    with pytest.raises(kvmix.InvalidArgumentError, match="key is a list"):
        cache.attend(0, q, [1.0, 2.0], v)
    with pytest.raises(kvmix.InvalidArgumentError, match="out shares memory with query"):
        cache.attend(0, q, k, v, out=q)
    frozen = np.empty_like(q)
    frozen.flags.writeable = False
    with pytest.raises(kvmix.InvalidArgumentError, match="out is"):
        cache.attend(0, q, k, v, out=frozen)
    with pytest.raises(kvmix.InvalidArgumentError, match="layer 1 came where layer 0"):
        cache.attend(1, q, k, v)
    with pytest.raises(kvmix.InvalidArgumentError, match="layer is 2"):
        cache.attend(2, q, k, v)
    with pytest.raises(kvmix.InvalidArgumentError, match="0 of 2"):
        cache.end_step()
    cache.abort_step()
    assert cache.length(sequence) == 0 and not cache.in_step
    # Rows with a stride of their own, and read-only ones, are as good.
    wide = np.zeros((3, 8, 64), np.float32)
    wide[:, :6] = q
    k.flags.writeable = False
    with cache.step([(sequence, 3)]) as step:
        strided = step.attend(0, wide[:, :6], k, v)
        step.attend(1, q, k, v)
    assert np.abs(strided - exact(q, k, v, SHAPE.layers[0], 0)).max() < 2e-3


def test_an_exception_undoes_the_step():
    cache = kvmix.Cache(kvmix.Plan.f16(SHAPE), SHAPE)
    sequence = cache.create()
    with pytest.raises(RuntimeError, match="mine"):
        with cache.step([(sequence, 3)]):
            raise RuntimeError("mine")
    with pytest.raises(kvmix.InvalidArgumentError, match="0 of 2"):
        with cache.step([(sequence, 3)]):
            pass
    assert cache.length(sequence) == 0 and not cache.in_step


def test_what_cannot_be_is_refused_when_it_is_made():
    plan = kvmix.Plan.f16(SHAPE)
    with pytest.raises(kvmix.InvalidArgumentError, match="nobody"):
        kvmix.Cache(plan, SHAPE, kernel="nobody")
    with pytest.raises(kvmix.InvalidArgumentError, match="tpu"):
        kvmix.Cache(plan, SHAPE, device="tpu")
    if why_no_gpu():
        with pytest.raises(kvmix.UnsupportedError, match="CUDA"):
            kvmix.Cache(plan, SHAPE, device="cuda")
        with pytest.raises(kvmix.UnsupportedError, match="CUDA"):
            kvmix.cuda_space()
    with pytest.raises(kvmix.InvalidArgumentError, match="stream"):
        kvmix.Cache(plan, SHAPE, stream=7)
    cache = kvmix.Cache(plan, SHAPE)
    cache.begin_step([(cache.create(), 1)])
    with pytest.raises(kvmix.InvalidArgumentError, match='"cuda"'):
        cache.launch_key()
    with pytest.raises(kvmix.InvalidArgumentError, match="query heads"):
        odd = kvmix.ModelShape([kvmix.LayerShape(5, 2, 64)])
        kvmix.Cache(kvmix.Plan.f16(odd), odd)
    other = kvmix.ModelShape(SHAPE.layers, name="other", fingerprint="other")
    with pytest.raises(kvmix.MismatchError, match="other"):
        kvmix.Cache(plan, other)
    assert any(available for _, _, available in kvmix.attention_kernels())
    assert "f16" in kvmix.codecs()


def test_attend_is_what_a_cache_would_compute():
    q, k, v = rows(2, 6), rows(500, 2), rows(500, 2)
    layer = kvmix.LayerShape(6, 2, 64)
    want = exact(q, k, v, layer, 498)
    errors = [np.abs(kvmix.attend(q, k, v, key_bits=b, value_bits=b) - want).max() for b in (16, 8, 4, 2)]
    assert errors[0] < 2e-3 and errors == sorted(errors) and 0.02 < errors[-1] < 0.5
    np.testing.assert_allclose(
        kvmix.attend(q, k, v, sliding_window=40, softcap=20.0),
        exact(q, k, v, kvmix.LayerShape(6, 2, 64, sliding_window=40, softcap=20.0), 498),
        atol=2e-3,
    )
    with pytest.raises(kvmix.InvalidArgumentError, match="501 queries"):
        kvmix.attend(rows(501, 6), k, v)


def test_results_do_not_depend_on_the_run():
    outs = []
    random = np.random.default_rng(3)
    k, v, q = (random.standard_normal((400, h, 64)).astype(np.float32) for h in (2, 2, 6))
    for _ in range(2):
        outs.append(kvmix.attend(q[-3:], k, v, key_bits=3, value_bits=3, threads=2))
    np.testing.assert_array_equal(*outs)
