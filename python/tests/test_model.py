import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

import kvmix

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def command():
    """The command line of the same sources, which scripts/test builds."""
    path = pathlib.Path(os.environ.get("KVMIX_COMMAND", ROOT / "build" / "release" / "apps" / "kvmix" / "kvmix"))
    if not path.exists():
        pytest.skip(f"{path} is not built, so its numbers cannot be compared: build it or set KVMIX_COMMAND")
    return path


def test_shape_and_tokens(smollm2, smollm2_path):
    assert len(smollm2.shape.layers) == 30
    layer = smollm2.shape.layers[0]
    assert (layer.q_heads, layer.kv_heads, layer.head_dim, layer.sliding_window) == (9, 3, 64, 0)
    assert layer.scale == pytest.approx(1 / 8)
    tokens = smollm2.tokenize("The tide comes in twice a day.")
    assert smollm2.detokenize(tokens) == b"The tide comes in twice a day."
    assert smollm2.path == str(smollm2_path) and smollm2.vocab_size == 49152
    chat = smollm2.chat_tokens([("user", "Hello")])
    assert b"Hello" in smollm2.detokenize(chat) and len(chat) > len(smollm2.tokenize("Hello"))


def test_text_is_continued(smollm2):
    prompt = smollm2.tokenize("The capital of France is")
    pieces = []
    text = smollm2.generate(prompt, max_tokens=8, temperature=0, on_text=pieces.append)
    assert "Paris" in text and "".join(pieces) == text
    packed = smollm2.generate(prompt, kvmix.Plan.uniform(smollm2.shape, 4, 4), max_tokens=8, temperature=0)
    assert packed.startswith(" Paris.")
    stopped = []
    smollm2.generate(prompt, max_tokens=50, temperature=0, on_text=lambda t: stopped.append(t) or len(stopped) < 3)
    assert len(stopped) == 3


def test_logits_do_not_depend_on_how_the_cache_stores_them_much(tiny):
    tokens = tiny.tokenize("the quick brown fox jumps over the lazy dog " * 20)[:400]
    f16 = tiny.logits(tokens)
    assert f16.shape == (400, tiny.vocab_size) and f16.dtype == np.float32
    eight = tiny.logits(tokens, kvmix.Plan.uniform(tiny.shape, 8, 8))
    two = tiny.logits(tokens, kvmix.Plan.uniform(tiny.shape, 2, 2))
    assert 0 < np.abs(eight - f16).mean() < 0.2 * np.abs(two - f16).mean()
    with pytest.raises(kvmix.InvalidArgumentError, match="vocabulary"):
        tiny.logits([tiny.vocab_size])


def test_models_that_are_none_are_refused(tmp_path):
    with pytest.raises(kvmix.NotFoundError, match="missing.gguf"):
        kvmix.Model(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(kvmix.CorruptError, match="text.gguf"):
        kvmix.Model(tmp_path / "text.gguf")


def test_evaluation_gives_the_command_lines_numbers(smollm2, smollm2_path, prose, command, tmp_path):
    (tmp_path / "text.txt").write_text(prose)
    arguments = [command, "eval", smollm2_path, "--json", "--text", tmp_path / "text.txt", "--uniform", "4/2"]
    arguments += ["--context", "320", "--windows", "1", "--threads", "2"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    want = json.loads(run.stdout)["rows"]
    plan = kvmix.Plan.uniform(smollm2.shape, 4, 2)
    rows = kvmix.evaluate(smollm2, prose, {"uniform 4/2": plan}, context=320, windows=1, threads=2)
    assert [r.name for r in rows] == [r["name"] for r in want]
    for row, other in zip(rows, want):
        for field in ("cache_bytes", "scored_tokens", "bits_per_element"):
            assert getattr(row, field) == pytest.approx(other[field])
        for field in ("perplexity", "kl_mean", "kl_p99", "top1"):
            assert getattr(row, field) == pytest.approx(other[field], rel=2e-2, abs=2e-4), field
    assert rows[0].kl_mean == 0 and 0 < rows[1].kl_mean < 0.5


def test_evaluation_takes_only_plans_of_the_model(tiny, other_tiny):
    plan = kvmix.Plan.uniform(other_tiny.shape, 4, 4)
    text = "the tide " * 400
    with pytest.raises(kvmix.MismatchError, match="the other"):
        kvmix.evaluate(tiny, text, {"the other": plan}, context=256, windows=1)
    rows = kvmix.evaluate(tiny, text, [plan], context=256, windows=1, force=True)
    assert len(rows) == 2 and rows[1].name == plan.note
    with pytest.raises(kvmix.InvalidArgumentError):
        kvmix.evaluate(tiny, "short", [plan], context=256, force=True)
