"""KVmixCache against transformers' own attention, on random tiny models of each family."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kvmix.transformers needs torch")
transformers = pytest.importorskip("transformers", reason="kvmix.transformers needs transformers")

from conftest import device_or_skip  # noqa: E402

import kvmix  # noqa: E402
from kvmix.transformers import KVmixCache, model_shape, use_kvmix  # noqa: E402

torch.set_num_threads(1)  # the models are tiny, and threads that wait for others slow a busy machine down
SIZES = {
    "vocab_size": 99,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda t: t.LlamaConfig(**SIZES, head_dim=32),
    "mistral": lambda t: t.MistralConfig(**SIZES, head_dim=32, sliding_window=90),
    "qwen2": lambda t: t.Qwen2Config(**{**SIZES, "hidden_size": 128}),
    "qwen3": lambda t: t.Qwen3Config(**SIZES, head_dim=64),
    "gemma3": lambda t: t.Gemma3TextConfig(
        **SIZES, head_dim=64, query_pre_attn_scalar=50, sliding_window=90,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip


def make_model(family, device="cpu"):
    torch.manual_seed(5)
    config = FAMILIES[family](transformers)
    if device == "cuda":  # whose kernels want heads of 64 at least
        config = type(config)(**{**config.to_dict(), "head_dim": 64})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    model.eval()
    model.generation_config.eos_token_id = None  # all rows have one length
    return model


@pytest.fixture(scope="module", params=[f"{family}-{device}" for device in ("cpu", "cuda") for family in FAMILIES])
def models(request):
    """The same weights twice: with transformers' attention and with ours."""
    family, device = request.param.split("-")
    model = make_model(family, device_or_skip(device))
    return model, use_kvmix(copy.deepcopy(model))


@pytest.fixture(scope="module", params=("cpu", "cuda"))
def llama(request):
    model = make_model("llama", device_or_skip(request.param))
    return model, use_kvmix(copy.deepcopy(model))


def f16(model):
    return KVmixCache(kvmix.Plan.f16(model_shape(model)), model, exact=True, threads=1)


def packed(model, bits, **options):
    return KVmixCache(kvmix.Plan.uniform(model_shape(model), bits, bits), model, threads=1, **options)


def ids(batch, tokens, seed=1):
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def run(model, cache, chunks, mask=None):
    """Logits of chunks that come one after the other."""
    logits, seen = [], 0
    mask = mask if mask is None else mask.to(model.device)
    with torch.no_grad():
        for chunk in (c.to(model.device) for c in chunks):
            seen += chunk.shape[1]
            part = None if mask is None else mask[:, :seen]
            positions = None if mask is None else (part.cumsum(-1) - 1).clamp(min=0)[:, -chunk.shape[1] :]
            out = model(chunk, attention_mask=part, position_ids=positions, past_key_values=cache, use_cache=True)
            logits.append(out.logits.cpu())
    return torch.cat(logits, 1)


def own(model, chunks, mask=None):
    return run(model, transformers.DynamicCache(config=model.config), chunks, mask)


def assert_close(given, want, part=0.01):
    """Root mean square of the difference as a part of the numbers' spread: pages hold fp16, and their arithmetic rounds."""
    error = (given.float() - want.float()).pow(2).mean().sqrt() / want.float().std()
    assert error < part, error


def test_the_shape_is_the_models(models):
    shape = model_shape(models[0])
    config = models[0].config
    assert len(shape.layers) == config.num_hidden_layers and shape.architecture == config.model_type
    for layer, module in zip(shape.layers, models[0].model.layers):
        assert layer.head_dim == module.self_attn.head_dim
        assert layer.scale == pytest.approx(module.self_attn.scaling)
    windows = {"mistral": [90] * 3, "gemma3_text": [90, 0, 90]}.get(config.model_type, [0] * 3)
    assert [layer.sliding_window for layer in shape.layers] == windows
    assert shape.fingerprint == model_shape(models[1]).fingerprint
    assert shape.fingerprint == model_shape(copy.deepcopy(models[0]).to(torch.bfloat16)).fingerprint
    assert shape.fingerprint != model_shape(make_model("llama" if config.model_type != "llama" else "qwen3")).fingerprint


def test_f16_plans_give_transformers_tensors(models):
    """Prompt, chunks, single tokens; far beyond the sliding windows."""
    exact, ours = models
    tokens = ids(2, 300)
    chunks = tokens.split([200, 37, 1, 1, 60, 1], 1)
    cache = f16(ours)
    assert_close(run(ours, cache, chunks), own(exact, chunks))
    assert cache.get_seq_length() == 300 and len(cache.sequences) == 2


def test_left_padding_is_not_seen_nor_stored(models):
    exact, ours = models
    tokens = ids(3, 160)
    mask = torch.ones_like(tokens)
    mask[0, :130] = 0
    mask[1, :7] = 0
    chunks = tokens.split([100, 50, 1, 1, 8], 1)  # the first row's first chunk is nothing but padding
    cache = f16(ours)
    given, want = run(ours, cache, chunks, mask), own(exact, chunks, mask)
    real = mask.bool()
    assert_close(given[real], want[real])
    assert [cache.pages.length(s) for s in cache.sequences] == [30, 153, 160]


@pytest.mark.parametrize("bits, part", [(8, 0.2), (4, 1.5)])
def test_low_bits_are_near(models, bits, part):
    exact, ours = models
    tokens = ids(2, 420)
    chunks = tokens.split([380] + [1] * 40, 1)
    given, want = run(ours, packed(ours, bits), chunks), own(exact, chunks)
    error = (given - want)[:, 380:].pow(2).mean().sqrt() / want.std()
    assert 0 < error < part / 4, error


def test_low_bits_are_what_is_stored(llama):
    """transformers' attention over the numbers that the pages hold gives the same tensors."""
    exact, ours = llama
    tokens = ids(1, 401)
    cache = packed(ours, 3, exact=True)
    run(ours, cache, tokens[:, :400].split([399, 1], 1))
    stored = transformers.DynamicCache()
    for layer in range(3):
        sides = [
            torch.from_numpy(np.stack([cache.pages.read(cache.sequences[0], layer, head, side) for head in range(2)]))[None]
            for side in ("key", "value")
        ]
        stored.update(*(side.to(exact.device) for side in sides), layer)
    assert cache.pages.sealed_pages > 0
    assert_close(run(ours, cache, [tokens[:, 400:]]), run(exact, stored, [tokens[:, 400:]]))


def answer(model, tokens, **options):
    """model.generate with tensors on its device."""
    options = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return model.generate(tokens.to(model.device), do_sample=False, **options)


def continued(model, tokens, **options):
    """transformers' own greedy continuation, and of each row how many tokens it chose by a margin that rounding leaves."""
    out = answer(model, tokens, return_dict_in_generate=True, output_logits=True, **options)
    logits = torch.stack(out.logits, 1)
    top = logits.topk(2).values
    clear = (top[..., 0] - top[..., 1] > 0.02 * logits.std()).long()
    return out.sequences, tokens.shape[1] + clear.cumprod(1).sum(1)


def assert_same_tokens(given, want, least):
    sequences, clear = want
    assert given.shape == sequences.shape
    for row, end in enumerate(clear):
        assert torch.equal(given[row, :end].to(sequences.device), sequences[row, :end])
    assert max(clear) >= least, "the text is too random to say anything"


def test_generation_gives_the_same_tokens(models):
    exact, ours = models
    tokens = ids(4, 120)
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24}
    want = continued(exact, tokens, **options)
    assert_same_tokens(answer(ours, tokens, past_key_values=f16(ours), **options), want, 130)
    # The same model without a KVmixCache is transformers' own.
    assert torch.equal(answer(ours, tokens, **options), want[0])


def test_chunked_prefill(models):
    exact, ours = models
    tokens = ids(4, 150, seed=3)
    options = {"max_new_tokens": 16, "attention_mask": torch.ones_like(tokens)}
    want = continued(exact, tokens, **options)
    cache = f16(ours)
    given = answer(ours, tokens, past_key_values=cache, prefill_chunk_size=64, **options)
    assert_same_tokens(given, want, 155)
    assert cache.get_seq_length() == 165


def test_beams(models):
    exact, ours = models
    tokens = ids(2, 150, seed=3)
    options = {"max_new_tokens": 6, "attention_mask": torch.ones_like(tokens), "num_beams": 3}
    options |= {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    want, given = answer(exact, tokens, **options), answer(ours, tokens, past_key_values=f16(ours), **options)
    assert torch.allclose(given.sequences_scores, want.sequences_scores, atol=2e-3)
    assert torch.equal(given.sequences, want.sequences)


def test_assisted_decoding(llama):
    exact, ours = llama
    tokens = ids(1, 60, seed=4).repeat(1, 3)
    options = {"max_new_tokens": 40, "attention_mask": torch.ones_like(tokens)}
    want = continued(exact, tokens, **options)
    given = answer(ours, tokens, past_key_values=f16(ours), prompt_lookup_num_tokens=5, **options)
    assert_same_tokens(given, want, 184)
    cache = f16(ours)
    assistant = copy.deepcopy(exact)
    given = answer(ours, tokens, past_key_values=cache, assistant_model=assistant, **options)
    assert_same_tokens(given, want, 184)
    assert cache.get_seq_length() >= given.shape[1] - 1


@pytest.mark.skipif(
    not hasattr(transformers.Cache, "is_croppable"), reason="this transformers does not ask whether a cache can go back"
)
def test_assisted_decoding_over_windows_is_refused():
    ours = use_kvmix(make_model("mistral"))
    tokens = ids(1, 40).repeat(1, 4)
    with pytest.raises(ValueError, match="crop"):
        ours.generate(tokens, past_key_values=f16(ours), prompt_lookup_num_tokens=5, max_new_tokens=20)


def test_cropping_the_last_step_leaves_no_trace(llama):
    _, ours = llama
    tokens = ids(2, 400)
    straight, cropped = packed(ours, 3), packed(ours, 3)
    run(ours, straight, [tokens[:, :380]])
    run(ours, cropped, [tokens[:, :380], tokens[:, 390:397]])
    cropped.crop(-7)
    assert cropped.get_seq_length() == 380
    rest = tokens[:, 380:].split(1, 1)
    assert torch.equal(run(ours, straight, rest), run(ours, cropped, rest))
    with pytest.raises(kvmix.InvalidArgumentError, match="401"):
        cropped.crop(-401)


def test_rows_are_copied_chosen_and_reset(llama):
    _, ours = llama
    tokens = ids(2, 200)
    cache = packed(ours, 4)
    run(ours, cache, [tokens])
    cache.batch_repeat_interleave(2)
    out = run(ours, cache, [tokens[:, :1].repeat_interleave(2, 0)])
    assert torch.equal(out[0], out[1]) and torch.equal(out[2], out[3]) and not torch.equal(out[0], out[2])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert len(cache.sequences) == 2 and len(cache.pages.sequences) == 2
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.pages.sequences == []
    run(ours, cache, [ids(3, 20)])


def test_other_types_of_numbers(llama):
    exact, _ = llama
    tokens = ids(2, 150)
    chunks = tokens.split([140] + [1] * 10, 1)
    half = use_kvmix(copy.deepcopy(exact).to(torch.bfloat16))
    given = run(half, packed(half, 8), chunks)
    assert given.dtype == torch.bfloat16
    want = own(copy.deepcopy(exact).to(torch.bfloat16), chunks).float()
    assert (given.float() - want).pow(2).mean().sqrt() < 0.1 * want.std()


def page_bytes(cache):
    """Of pages in use: on a GPU memory is taken in chunks larger than all of these."""
    memory = cache.pages.memory()
    return memory["total_bytes"] - memory["slack_bytes"]


def test_memory_is_the_plans(llama):
    _, ours = llama
    cache = packed(ours, 2)
    run(ours, cache, ids(1, 1500).split(128, 1))
    full = f16(ours)
    run(ours, full, ids(1, 1500).split(128, 1))
    assert page_bytes(cache) * 3 < page_bytes(full)


def test_what_cannot_work_is_refused(llama):
    exact, ours = llama
    shape = model_shape(ours)
    with pytest.raises(kvmix.MismatchError):
        KVmixCache(kvmix.Plan.f16(model_shape(make_model("qwen3"))), ours)
    with pytest.raises(kvmix.InvalidArgumentError, match="use_kvmix"):
        run(exact, KVmixCache(kvmix.Plan.f16(shape), exact), [ids(1, 4)])
    cache = f16(ours)
    with pytest.raises(kvmix.UnsupportedError, match="no_grad"):
        ours(ids(1, 4).to(ours.device), past_key_values=cache)
    run(ours, cache, [ids(1, 4)])  # what failed has left nothing
    with pytest.raises(kvmix.InvalidArgumentError, match="1 rows, the batch has 2"):
        run(ours, cache, [ids(2, 4)])
    with pytest.raises(kvmix.UnsupportedError, match="left"):
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[1, 7:] = 0
        run(ours, f16(ours), [ids(2, 10)], mask)
    padded = f16(ours)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    run(ours, padded, [ids(2, 10)], mask)
    with pytest.raises(kvmix.InvalidArgumentError, match="padded by 3"):
        run(ours, padded, [ids(2, 1)])
    with pytest.raises(kvmix.UnsupportedError, match="not causal"), torch.no_grad():
        seen = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=ours.device)
        ours(ids(1, 4).to(ours.device), attention_mask=seen, past_key_values=f16(ours))
    with pytest.raises(kvmix.MismatchError, match="softcap"):
        cache.layers[0].check(None, None, None, 30.0)
    with pytest.raises(kvmix.UnsupportedError, match="encoder"):
        tiny = transformers.T5Config(d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=32, vocab_size=99)
        model_shape(transformers.T5ForConditionalGeneration(tiny))
