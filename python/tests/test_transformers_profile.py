"""Gradient scores by torch against those of the GGUF engine, of the same weights."""

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
