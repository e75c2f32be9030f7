"""Gradient scores by torch against those of the GGUF engine, of the same weights."""

import os

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kvmix.transformers needs torch")
transformers = pytest.importorskip("transformers", reason="kvmix.transformers needs transformers")

import kvmix  # noqa: E402
from kvmix.transformers import KVmixCache, model_shape, profile, use_kvmix  # noqa: E402

torch.set_num_threads(1)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def dequantised(path):
    reader = gguf.GGUFReader(path)
    return {t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))) for t in reader.tensors}


def as_transformers(path, config):
    """A GGUF llama as transformers has it: rows of q and k go from pairs of neighbours to halves."""
    tensors = dequantised(path)

    def halves(weight, heads):
        return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)

    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"]}
    state["lm_head.weight"] = tensors.get("output.weight", tensors["token_embd.weight"])
    for layer in range(config.num_hidden_layers):
        for own, theirs in NAMES.items():
            weight = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs == "attn_q":
                weight = halves(weight, config.num_attention_heads)
            if theirs == "attn_k":
                weight = halves(weight, config.num_key_value_heads)
            state[f"model.layers.{layer}.{own}.weight"] = weight
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def tiny_pair(tiny):
    config = transformers.LlamaConfig(
        vocab_size=tiny.vocab_size, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    )  # fmt: skip
    return tiny, as_transformers(tiny.path, config)


def test_the_models_are_the_same(tiny_pair):
    ours, theirs = tiny_pair
    tokens = ours.tokenize("the quick brown fox " * 30)[:100]
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0].numpy()
    assert np.sqrt(np.mean((ours.logits(tokens) - want) ** 2)) < 0.01 * want.std()


def test_scores_equal_the_engines(tiny_pair, tmp_path):
    ours, theirs = tiny_pair
    text = "the quick brown fox jumps over the lazy dog and all the others of that kind " * 40
    (tmp_path / "text.txt").write_text(text)
    want = kvmix.profile(ours, text=tmp_path / "text.txt", prompts=1, tokens=256, sensitivity=None)
    before = [p.requires_grad for p in theirs.parameters()]
    runs = []
    counter = theirs.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    given = profile(theirs, [ours.tokenize(text)[:256]])
    counter.remove()
    assert len(runs) == 2  # activations were not kept but computed again
    assert given.tokens == want.tokens == 256
    np.testing.assert_allclose(given.key_score, want.key_score, rtol=1e-3)
    np.testing.assert_allclose(given.value_score, want.value_score, rtol=1e-3)
    assert before == [p.requires_grad for p in theirs.parameters()] and not theirs.training
    assert all(p.grad is None for p in theirs.parameters())


def rank_correlation(a, b):
    return np.corrcoef(*(np.argsort(np.argsort(x)) for x in (a, b)))[0, 1]


@pytest.mark.skipif(
    "KVMIX_PROFILE_TOKENS" not in os.environ, reason="takes minutes: set KVMIX_PROFILE_TOKENS=512, and -s to see the numbers"
)
def test_scores_of_a_real_model_are_the_engines(smollm2, smollm2_path, prose, tmp_path):
    """SmolLM2, whose weights torch gets as ggml dequantises them, while ggml's own products round activations to 8 bits: layers
    in the same order, and plans that lose as much."""
    config = transformers.LlamaConfig(
        vocab_size=smollm2.vocab_size, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
    )  # fmt: skip
    theirs = as_transformers(smollm2_path, config)
    tokens = int(os.environ["KVMIX_PROFILE_TOKENS"])
    (tmp_path / "text.txt").write_text(prose)
    want = kvmix.profile(smollm2, text=tmp_path / "text.txt", prompts=1, tokens=tokens, sensitivity=None)
    given = profile(theirs, [smollm2.tokenize(prose)[:tokens]])
    assert given.tokens == want.tokens == tokens
    for side in ("key_score", "value_score"):
        engines, torchs = (np.array(getattr(p, side)) for p in (want, given))
        print(
            f"{side}: rank correlation {rank_correlation(engines, torchs):.5f}, "
            f"largest difference {np.abs(torchs / engines - 1).max():.4f}"
        )
        assert rank_correlation(engines, torchs) > 0.99
        np.testing.assert_allclose(torchs, engines, rtol=0.1)
    # The two fingerprints differ, so torch's scores are put on the engine's shape.
    moved = kvmix.Profile.from_scores(smollm2.shape, [given.key_score], [given.value_score], tokens)
    plans = {name: kvmix.plan(smollm2, p, planner="kvmix-paper") for name, p in (("engine", want), ("torch", moved))}
    alike = sum(a == b for a, b in zip(plans["engine"].layers, plans["torch"].layers, strict=True))
    rows = {row.name: row for row in kvmix.evaluate(smollm2, prose, plans, context=512, windows=4)}
    print(f"plans alike in {alike} of 30 layers")
    for row in rows.values():
        print(f"{row.name}: KL {row.kl_mean:.5f} +- {row.kl_stderr:.5f} at {row.bits_per_element:.3f} bits")
    spread = np.hypot(rows["engine"].kl_stderr, rows["torch"].kl_stderr)
    assert abs(rows["engine"].kl_mean - rows["torch"].kl_mean) < 3 * spread


def test_plans_of_the_scores_run(tiny_pair):
    _, theirs = tiny_pair
    measured = profile(theirs, [list(range(3, 120)), list(range(200, 100, -1))])
    assert measured.prompts == 2 and measured.tokens == 217
    plan = kvmix.plan(model_shape(theirs), measured, planner="kvmix-paper")
    assert len({k for k, _ in plan.layers}) == 2  # more bits where the score is large
    model = use_kvmix(theirs)
    cache = KVmixCache(plan, model, threads=1)
    model.generate(torch.arange(3, 253)[None], past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.get_seq_length() == 253
    model.set_attn_implementation("sdpa")


def test_prompts_that_cannot_be_are_refused(tiny_pair):
    _, theirs = tiny_pair
    with pytest.raises(kvmix.InvalidArgumentError, match="no prompts"):
        profile(theirs, [])
    with pytest.raises(kvmix.InvalidArgumentError, match="prompt 1 has 1 tokens"):
        profile(theirs, [[3, 4], [3]])
    with pytest.raises(kvmix.InvalidArgumentError, match="give the tokenizer"):
        profile(theirs, ["text"])
    with pytest.raises(kvmix.InvalidArgumentError, match="layers"):
        kvmix.Profile.from_scores(model_shape(theirs), [[1.0]], [[1.0]], 10)
