"""Small models with random weights as vLLM loads them, and how answers of two runs are compared."""

import random


def tokens(n, seed):
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(n)]


def write_model(folder, family, seed=1):
    """A folder with weights, configuration and a tokenizer whose word wN is token N."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    common = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.12,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family == "llama":
        config = transformers.LlamaConfig(**common)
    elif family == "gemma3":
        config = transformers.Gemma3TextConfig(
            **common, sliding_window=200, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
        )
    elif family == "deepseek":
        config = transformers.DeepseekV2Config(
            **common | {"num_key_value_heads": 4}, kv_lora_rank=64, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=32,
            v_head_dim=32, first_k_dense_replace=3, n_routed_experts=4, moe_intermediate_size=64,
        )  # fmt: skip
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(folder)
    return folder


def assert_same_but_for_ties(given, want, gap):
    """Greedy answers [(token, {likeliest: log probability})]: where one first takes another token, both had it that near."""
    same = 0
    for one, other in zip(given, want, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a[0] != b[0]), None)
        if at is None:
            same += 1
            continue
        for mine, theirs in ((one[at], other[at]), (other[at], one[at])):
            likely = mine[1]
            assert theirs[0] in likely and likely[mine[0]] - likely[theirs[0]] < gap, f"token {at}: {mine} against {theirs}"
    assert same >= len(want) / 2, f"{same} of {len(want)} answers are the same"
