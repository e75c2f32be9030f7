"""Models: SmolLM2 from scripts/models, and tiny ones with random weights written as GGUF files."""

import os
import pathlib

import numpy as np
import pytest

import kvmix

ROOT = pathlib.Path(__file__).parents[2]
LLAMA = {"layers": 3, "dim": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 192}


def cache_folder():
    """The rule of scripts/models."""
    if own := os.environ.get("KVMIX_CACHE_DIR"):
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kvmix"


def why_no_gpu():
    """Why tests of the device "cuda" cannot run here; "" if they can."""
    try:
        kvmix.cuda_space()
    except kvmix.UnsupportedError as e:
        return str(e)
    try:
        import torch
    except ImportError:
        return "tensors on a GPU need torch"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def device_or_skip(name):
    """With KVMIX_TEST_DEVICE=cuda in the environment what is missing fails tests instead of skipping them."""
    if name == "cuda" and (why := why_no_gpu()):
        (pytest.fail if os.environ.get("KVMIX_TEST_DEVICE") == "cuda" else pytest.skip)(why)
    return name


@pytest.fixture(scope="session")
def smollm2_path():
    path = cache_folder() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.exists(), f"{path} is missing: run scripts/models smollm2"
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return kvmix.Model(smollm2_path)


def write_llama(path, seed=7, name="tiny"):
    """A llama with random weights and the smallest vocabulary that libllama takes, as tests/support/tiny_model.h writes it."""
    import gguf  # which tests of other models go without

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_block_count(LLAMA["layers"])
    writer.add_context_length(1024)
    writer.add_embedding_length(LLAMA["dim"])
    writer.add_feed_forward_length(LLAMA["ffn"])
    writer.add_head_count(LLAMA["heads"])
    writer.add_head_count_kv(LLAMA["kv_heads"])
    writer.add_key_length(LLAMA["head_dim"])
    writer.add_value_length(LLAMA["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(20000.0)
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)] + [(f"<0x{b:02X}>", 6) for b in range(256)]
    for letter in "abcdefghijklmnopqrstuvwxyz":
        pieces += [(letter, 1), ("\u2581" + letter, 1)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(i + 1) for i in range(len(pieces))])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name, inputs, outputs):
        weights = random.standard_normal((outputs, inputs)) * 1.5 / np.sqrt(inputs)
        writer.add_tensor(name, weights.astype(np.float32))

    def norm(name):
        writer.add_tensor(name, (1 + 0.1 * random.standard_normal(LLAMA["dim"])).astype(np.float32))

    dim, ffn = LLAMA["dim"], LLAMA["ffn"]
    q, kv = LLAMA["heads"] * LLAMA["head_dim"], LLAMA["kv_heads"] * LLAMA["head_dim"]
    matrix("token_embd.weight", dim, len(pieces))
    norm("output_norm.weight")
    matrix("output.weight", dim, len(pieces))
    for layer in range(LLAMA["layers"]):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        norm(block + "ffn_norm.weight")
        matrix(block + "attn_q.weight", dim, q)
        matrix(block + "attn_k.weight", dim, kv)
        matrix(block + "attn_v.weight", dim, kv)
        matrix(block + "attn_output.weight", q, dim)
        matrix(block + "ffn_gate.weight", dim, ffn)
        matrix(block + "ffn_up.weight", dim, ffn)
        matrix(block + "ffn_down.weight", ffn, dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_llama(path)
    return kvmix.Model(path)


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "other.gguf"
    write_llama(path, seed=8, name="other")
    return kvmix.Model(path)


@pytest.fixture(scope="session")
def prose():
    """English of some length that is in the repository."""
    return "\n".join((ROOT / "docs" / name).read_text() for name in ("architecture.md", "glossary.md", "quality.md"))
