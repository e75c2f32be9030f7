"""Plans with token policies through transformers: what is kept, and that the model attends to just that."""

import copy
import re

import pytest

torch = pytest.importorskip("torch", reason="kvmix.transformers needs torch")
transformers = pytest.importorskip("transformers", reason="kvmix.transformers needs transformers")

from conftest import device_or_skip  # noqa: E402
from test_transformers import answer, assert_close, ids, make_model, page_bytes, run  # noqa: E402
from test_transformers_profile import tiny_pair  # noqa: E402, F401
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

import kvmix  # noqa: E402
from kvmix.transformers import Generator, KVmixCache, model_shape, use_kvmix  # noqa: E402

# Policies with the part of the logits' spread by which the widths that they ask for may move them.
POLICIES = {
    "streaming keep=0.3 sinks=4": 0.01,
    "streaming tokens=64 decode=evict": 0.01,
    "snapkv keep=0.3 window=16": 0.01,
    "pyramidkv keep=0.3 window=16": 0.01,
    "adakv keep=0.3 window=16": 0.01,
    "kvcrush keep=0.4": 0.01,
    "dbudgetkv threshold=0.2 frozen=0": 0.01,
    "quantized-pruning keep=0.25 k-bits=8 v-bits=8": 0.05,
    "h2o keep=0.3": 0.01,
    "leankv high=4 low=1": 0.4,
}
ON_CPU_ALONE = ("h2o keep=0.3", "leankv high=4 low=1")
SEEN = {}  # by layer: which keys each KV head sees, [heads, tokens]


def only_what_is_kept(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """PyTorch's attention, head by head without the keys that were dropped."""
    batch, heads, tokens, _ = query.shape
    length = key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)[None, None]
    seen = attention_mask.expand(batch, heads, -1, -1)
    group = heads // key.shape[1]
    if module.layer_idx in SEEN:
        kept = SEEN[module.layer_idx].to(query.device).repeat_interleave(group, 0)
        seen = seen & kept[None, :, None, :]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("only_what_is_kept", only_what_is_kept)
AttentionMaskInterface.register("only_what_is_kept", sdpa_mask)


@pytest.fixture(scope="module", params=["llama-cpu", "gemma3-cpu", "llama-cuda", "gemma3-cuda"])
def pair(request):
    """The same weights: a model that attends to what SEEN says, and ours."""
    family, device = request.param.split("-")
    model = make_model(family, device_or_skip(device))
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("only_what_is_kept")
    return theirs, use_kvmix(model)


@pytest.fixture(scope="module", params=("cpu", "cuda"))
def llama(request):
    return use_kvmix(make_model("llama", device_or_skip(request.param)))


def plan_with(model, policy, bits=16):
    shape = model_shape(model)
    plan = kvmix.Plan.f16(shape) if bits == 16 else kvmix.Plan.uniform(shape, bits, bits, {"window": "32"})
    return plan.with_tokens(policy)


def cache_with(model, policy, bits=16, **options):
    return KVmixCache(plan_with(model, policy, bits), model, threads=1, **({} if bits != 16 else {"exact": True}), **options)


def kept(cache, row=0):
    return [cache.pages.kept(cache.sequences[row], layer) for layer in range(len(cache.layers))]


def no_counting_on_gpus(model, policy):
    if model.device.type == "cuda" and policy in ON_CPU_ALONE:
        with pytest.raises(kvmix.UnsupportedError, match='the device "cuda"'):
            cache_with(model, policy)
        return True
    return False


@pytest.mark.parametrize("policy", POLICIES)
def test_attention_is_over_the_tokens_that_are_kept(pair, policy):
    """Head by head, with the positions that they had."""
    theirs, ours = pair
    if no_counting_on_gpus(ours, policy):
        return
    decodes = any(name in policy for name in ("evict", "h2o", "leankv"))
    tokens = ids(1, 300 + (140 if decodes else 20))
    cache, full = cache_with(ours, policy), transformers.DynamicCache(config=theirs.config)
    SEEN.clear()
    parts = tokens.split([300] + [1] * (tokens.shape[1] - 300), 1)
    given, want = [run(ours, cache, parts[:1])], [run(theirs, full, parts[:1])]
    after_prompt = kept(cache)
    governed = [layer for layer, s in enumerate(cache.shape.layers) if not s.sliding_window]
    assert all(len(head) < 300 for layer in governed for head in after_prompt[layer])
    for position, part in enumerate(parts[1:], 300):
        # Which keys a window shows is the mask's to say.
        for layer in governed:
            SEEN[layer] = torch.zeros(len(kept(cache)[layer]), position + 1, dtype=torch.bool)
            for head, positions in enumerate(kept(cache)[layer]):
                SEEN[layer][head, positions] = True
                SEEN[layer][head, position] = True
        given.append(run(ours, cache, [part]))
        want.append(run(theirs, full, [part]))
    SEEN.clear()
    assert cache.get_seq_length() == tokens.shape[1] == cache.pages.length(cache.sequences[0])
    assert_close(torch.cat(given, 1), torch.cat(want, 1), POLICIES[policy])
    if decodes and "leankv" not in policy:  # which may only lower precision
        assert any(set(before) - set(now) for l in governed for before, now in zip(after_prompt[l], kept(cache)[l]))


def test_snapkv_keeps_what_the_last_queries_attend_to(pair):
    """Chosen here from transformers' own attention weights, by the paper's rule."""
    theirs, ours = pair
    tokens = ids(1, 200, seed=7)
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(tokens.to(eager.device), output_attentions=True).attentions
    plan = kvmix.Plan.uniform(model_shape(ours), 16, 16, {"sinks": "0", "window": "16"})
    cache = KVmixCache(plan.with_tokens("snapkv tokens=60 window=16 pooling=avg kernel=5 sinks=0"), ours, threads=1)
    run(ours, cache, [tokens])
    for layer, shape in enumerate(cache.shape.layers):
        if shape.sliding_window:
            continue
        votes = weights[layer][0, :, -16:, :-16].mean(1).unflatten(0, (shape.kv_heads, -1)).mean(1)
        votes = torch.nn.functional.avg_pool1d(votes, 5, 1, 2)
        for head in range(shape.kv_heads):
            best = sorted(votes[head].topk(60 - 16).indices.tolist()) + list(range(184, 200))
            # Pages hold rounded keys: what lies next to the boundary may fall to either side.
            assert len(set(best) ^ set(kept(cache)[layer][head])) <= 2


def test_policies_choose_as_the_engine_for_ggufs_does(tiny_pair):  # noqa: F811
    """The same greedy text as the library's own engine has of the same weights, which is not that of all tokens."""
    engine, model = tiny_pair
    model = use_kvmix(copy.deepcopy(model))
    text = "the quick brown fox jumps over the lazy dog and all the others of that kind "
    said, compared = {}, 0
    for policy in (None, "snapkv keep=0.2 window=16", "adakv keep=0.2 window=16", "h2o keep=0.2", "streaming keep=0.2"):
        for start in range(0, 40, 5):
            prompt = engine.tokenize((text * 6)[start:])[:300]
            want = engine.generate(prompt, kvmix.Plan.f16(engine.shape).with_tokens(policy), max_tokens=8, temperature=0)
            out = answer(
                model, torch.tensor([prompt]), past_key_values=cache_with(model, policy), max_new_tokens=8,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            logits = torch.stack(out.logits, 1)[0]
            top = logits.topk(2).values
            clear = int((top[:, 0] - top[:, 1] > 0.01 * logits.std()).long().cumprod(0).sum())
            given = engine.detokenize(out.sequences[0, len(prompt) : len(prompt) + clear].tolist())
            assert want.startswith(given.decode(errors="replace").partition("</s>")[0].rstrip("\ufffd"))
            said.setdefault(policy, []).append(want)
            compared += clear
    assert compared >= 100
    assert all(said[policy] != said[None] for policy in said if policy)


@pytest.mark.parametrize("policy", ["snapkv keep=0.3 window=16", "h2o keep=0.3"])
def test_chunks_of_an_announced_prompt_are_the_whole_prompt(llama, policy):
    if no_counting_on_gpus(llama, policy):
        return
    tokens = ids(2, 300, seed=3)
    whole, chunks = cache_with(llama, policy), cache_with(llama, policy)
    options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(tokens)}
    want = answer(llama, tokens, past_key_values=whole, **options)
    chunks.announce(300)
    assert torch.equal(answer(llama, tokens, past_key_values=chunks, prefill_chunk_size=128, **options), want)
    assert [kept(chunks, row) for row in (0, 1)] == [kept(whole, row) for row in (0, 1)]
    assert chunks.get_seq_length() == 307 and len(kept(whole)[0][0]) < 150


def test_padded_rows_keep_what_they_keep_alone(llama):
    tokens = ids(3, 260)
    mask = torch.ones_like(tokens)
    mask[0, :150] = 0
    mask[1, :3] = 0
    cache = cache_with(llama, "adakv keep=0.4 window=16")
    cache.announce(260)
    run(llama, cache, tokens.split([100, 100, 60], 1), mask)  # the first chunk of the first row is padding
    for row, start in enumerate((150, 3, 0)):
        alone = cache_with(llama, "adakv keep=0.4 window=16")
        run(llama, alone, [tokens[row : row + 1, start:]])
        for ours, theirs in zip(kept(cache, row), kept(alone)):
            lengths = [len(head) for head in theirs]
            assert [len(head) for head in ours] == lengths and max(lengths) < 260 - start
            # Rows of other batches are multiplied in another order: what is nearly as good may change places.
            assert all(len(set(a) ^ set(b)) <= 2 for a, b in zip(ours, theirs))


@pytest.mark.parametrize("policy", [p for p in POLICIES if "dbudget" not in p])
def test_generator_gives_the_same_tokens(llama, policy):
    """Over prompts that come in chunks, pages that are packed, and heads of different lengths."""
    if no_counting_on_gpus(llama, policy):
        return
    tokens = ids(3, 300, seed=5)
    mask = torch.ones_like(tokens)
    mask[0, :70] = 0
    new = 150 if any(name in policy for name in ("evict", "h2o", "leankv")) or llama.device.type == "cuda" else 12
    cache = cache_with(llama, policy, bits=4)
    want = answer(llama, tokens, past_key_values=cache, attention_mask=mask, max_new_tokens=new).cpu()
    generator = Generator(llama, plan_with(llama, policy, bits=4))
    given = generator.generate(tokens, mask, max_new_tokens=new, chunk=2048).cpu()
    # The generator's kernels are the same; on a GPU its steps may be cut otherwise, on the CPU all threads attend.
    same = (given == want).long().cumprod(1).sum(1) - 300
    assert int(same.max()) == new and int(same.float().mean()) >= 4
    again = generator.generate(tokens, mask, max_new_tokens=new, chunk=128)
    assert again.shape == given.shape
    if generator.graph:
        assert 0 < generator.captures < 20
    free = Generator(llama, plan_with(llama, None, bits=4))
    free.generate(tokens, mask, max_new_tokens=new)
    if policy.startswith(("streaming", "snapkv", "h2o")):  # others' pages are partly empty at such lengths
        assert page_bytes(generator.cache) < page_bytes(free.cache)


def test_beams_share_what_is_kept(llama):
    tokens = ids(2, 200, seed=3)
    options = {"max_new_tokens": 6, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    both = answer(llama, tokens, past_key_values=cache_with(llama, "snapkv keep=0.3 window=16"), **options)
    for row in (0, 1):
        alone = answer(llama, tokens[row : row + 1], past_key_values=cache_with(llama, "snapkv keep=0.3 window=16"), **options)
        assert torch.allclose(alone.sequences_scores, both.sequences_scores[row : row + 1], atol=2e-3)


def test_tokens_that_stand_for_decoded_ones_are_no_prompt(llama):
    tokens = ids(1, 280)
    cache, single = (cache_with(llama, "snapkv keep=0.3 window=16") for _ in range(2))
    run(llama, single, tokens.split([200] + [1] * 80, 1))
    run(llama, cache, [tokens[:, :200]])
    before = len(kept(cache)[0][0])
    cache.announce(80, decoded=True)
    run(llama, cache, tokens[:, 200:].split([50, 30], 1))
    assert kept(cache) == kept(single) and len(kept(cache)[0][0]) == before + 80
    cache.announce(100)  # a second prompt
    run(llama, cache, [ids(1, 100, seed=8)])
    assert len(kept(cache)[0][0]) < before + 180 and cache.get_seq_length() == 380


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_channels_of_keys_are_chosen_too(device):
    model = use_kvmix(make_model("qwen3", device_or_skip(device)))
    text = kvmix.Plan.uniform(model_shape(model), 4, 4, {"window": "0"}).to_json()
    text = text.replace('"layers"', '"channels": {"policy": "think", "keep": 0.5}, "layers"', 1)
    tokens = ids(1, 400)
    thin = KVmixCache(kvmix.Plan.from_json(text), model, threads=1)
    full = KVmixCache(kvmix.Plan.uniform(model_shape(model), 4, 4, {"window": "0"}), model, threads=1)
    for cache in (thin, full):
        run(model, cache, tokens.to(model.device).split([399, 1], 1))
    assert page_bytes(thin) < page_bytes(full)


def test_what_cannot_work_is_refused(llama):
    policy = "snapkv keep=0.3 window=16"
    tokens = ids(1, 60)

    def refused(kind, match, body):
        with pytest.raises(kind, match=match) as caught:
            body()
        assert "\n" not in str(caught.value)

    # Chunks that nobody announced: the first was taken for the prompt.
    chunked = cache_with(llama, policy)
    refused(kvmix.InvalidArgumentError, "announce", lambda: run(llama, chunked, tokens.split(30, 1)))
    refused(
        kvmix.InvalidArgumentError, "announce",
        lambda: answer(llama, tokens, past_key_values=cache_with(llama, policy), prefill_chunk_size=20, max_new_tokens=2),
    )  # fmt: skip
    chunked.reset()
    chunked.announce(60)
    run(llama, chunked, tokens.split(30, 1)[:1])
    refused(kvmix.InvalidArgumentError, "31 tokens where 30", lambda: run(llama, chunked, [ids(1, 31)]))
    refused(kvmix.InvalidArgumentError, "30 of the tokens that were announced", lambda: chunked.announce(4))
    refused(kvmix.InvalidArgumentError, "begin_decode while 30", chunked.begin_decode)
    refused(kvmix.InvalidArgumentError, "crop while 30", lambda: chunked.crop(-1))
    run(llama, chunked, tokens.split(30, 1)[1:] + (tokens[:, :1],) * 3)
    chunked.crop(-2)
    refused(kvmix.UnsupportedError, "snapkv.*60 tokens", lambda: chunked.crop(-20))
    refused(kvmix.InvalidArgumentError, "announce of 0", lambda: chunked.announce(0))
    if hasattr(transformers.Cache, "is_croppable"):
        refused(ValueError, "crop", lambda: answer(
            llama, tokens.repeat(1, 3), past_key_values=cache_with(llama, policy), prompt_lookup_num_tokens=5, max_new_tokens=8
        ))  # fmt: skip
    plan = kvmix.Plan.f16(model_shape(llama))
    refused(kvmix.InvalidArgumentError, "nobody", lambda: plan.with_tokens("nobody keep=0.5"))
    refused(kvmix.InvalidArgumentError, "depth", lambda: plan.with_tokens("snapkv depth=2"))
    assert plan.with_tokens(policy).tokens == policy and plan.with_tokens(policy).with_tokens(None).tokens is None
    assert re.search("snapkv", plan.with_tokens(policy).note)
