"""Attention over an engine's own blocks, as kvmix.vllm asks for it, on each device: against torch's attention."""

import pytest
from conftest import device_or_skip

torch = pytest.importorskip("torch", reason="blocks are torch's here")

from test_cuda import KV_HEADS, Rows, exact, shape  # noqa: E402

import kvmix  # noqa: E402
from kvmix import _native  # noqa: E402

BLOCKS = 24


@pytest.fixture(scope="module", params=("cpu", "cuda"))
def device(request):
    return device_or_skip(request.param)


class Engine:
    """Two layers' blocks, which hold rubbish at first."""

    def __init__(self, plan, model, device, sequences=4):
        self.device = torch.device(device)
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        self.paged = _native.NativePaged(plan, model, False, 1, sequences, 0, 1, device, stream)
        self.blocks = [
            torch.full((BLOCKS, self.paged.block_bytes(layer)), 0xA5, dtype=torch.uint8, device=device) for layer in range(2)
        ]

    def step(self, layer, items, q, k, v, **given):
        """items: (blocks, new rows, length) of each sequence."""
        begin = torch.tensor([0, *(n for _, n, _ in items)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([length for *_, length in items], dtype=torch.int32)
        table = torch.full((len(items), max(len(b) for b, *_ in items)), -1, dtype=torch.int32)
        for row, (blocks, *_) in zip(table, items):
            row[: len(blocks)] = torch.tensor(blocks)
        q, k, v = (x.to(self.device) for x in (q, k, v))
        out = torch.empty_like(q)
        arrays = {"blocks": self.blocks[layer % 2], "query": q, "key": k, "value": v, "out": out} | given
        self.paged.step(layer, begin, lengths, table, True, **arrays)
        return out.cpu()


@pytest.mark.parametrize("bits, options, tolerance", [
    (16, {}, 4e-3), (8, {"window": "0"}, 5e-2), (8, {"window": "150", "sinks": "0"}, 5e-2), (4, {"window": "0"}, 0.6),
])  # fmt: skip
def test_attention_equals_torchs(device, bits, options, tolerance):
    """Of a prompt in uneven parts, of single tokens, of two sequences at once, with a sliding window in one layer."""
    model = shape(128)
    engine = Engine(kvmix.Plan.uniform(model, bits, bits, options), model, device)
    rows = [Rows(128, seed) for seed in (1, 2)]
    places, lengths = [[3, 7, 1, 9], [4, 0, 8, 2]], [0, 0]
    for sizes in ((300, 40), (1, 128), (90, 1), (1, 1), (30, 200)):
        for layer in range(2):
            parts = [r.of(layer, n) for r, n in zip(rows, sizes)]
            items = [(p, n, length + n) for p, n, length in zip(places, sizes, lengths)]
            given = engine.step(layer, items, *(torch.cat(x) for x in zip(*parts)))
            for r, (q, _, _), out in zip(rows, parts, given.split(sizes)):
                want = exact(q, torch.cat(r.keys[layer]), torch.cat(r.values[layer]), model.layers[layer])
                assert (out - want).pow(2).mean().sqrt() < tolerance * want.pow(2).mean().sqrt()
        lengths = [length + n for length, n in zip(lengths, sizes)]
    assert engine.paged.memory()["open_bytes"] <= engine.paged.beside_bytes


def test_a_block_is_smaller_than_its_rows(device):
    model = shape(128)
    fp16 = 2 * 2 * 128 * 128 * KV_HEADS
    sizes = {}
    for bits in (2, 4, 16):
        plan = kvmix.Plan.uniform(model, bits, bits, {"window": "0"})
        sizes[bits] = Engine(plan, model, device).paged.block_bytes(0)
    assert sizes[16] <= fp16 + 64 and sizes[4] < fp16 / 3.3 and sizes[2] < fp16 / 5.5


def test_what_cannot_work_is_refused(device):
    model = shape(128)
    engine = Engine(kvmix.Plan.uniform(model, 4, 4, {"window": "0"}), model, device)
    q, k, v = Rows(128).of(0, 10)

    def refused(kind, match, items=(([0], 10, 10),), layer=0, **given):
        with pytest.raises(kind, match=match) as caught:
            engine.step(layer, list(items), q, k, v, **given)
        assert "\n" not in str(caught.value)

    refused(kvmix.InvalidArgumentError, "names block 24 of 24", [([24], 10, 10)])
    refused(kvmix.InvalidArgumentError, "longer than its blocks", [([0], 10, 200)])
    refused(kvmix.InvalidArgumentError, "layer is 2", layer=2)
    refused(kvmix.InvalidArgumentError, "query has shape", query=q[:9].to(device))
    refused(kvmix.InvalidArgumentError, "key is not float32", key=k.half().to(device))
    refused(kvmix.InvalidArgumentError, "not contiguous", value=v.repeat(1, 1, 2).to(device)[:, :, ::2])
    refused(kvmix.InvalidArgumentError, "blocks have shape", blocks=engine.blocks[0][:, :-128].contiguous())
    if device == "cuda":
        refused(kvmix.InvalidArgumentError, "blocks are not in the memory", blocks=engine.blocks[0].cpu())
        refused(kvmix.InvalidArgumentError, "out is not in the memory of GPU", out=torch.empty_like(q))
    with pytest.raises(kvmix.InternalError, match="given up"):  # tokens that were never stored
        engine.step(0, [([5, 6], 10, 150)], q, k, v)
    with pytest.raises(kvmix.UnsupportedError, match="policies"):
        Engine(kvmix.Plan.f16(model).with_tokens("streaming"), model, device)
