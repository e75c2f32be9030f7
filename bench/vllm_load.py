#!/usr/bin/env python3
"""Requests at once to vLLM's server with a plan of KVmix and without, in equal memory: both stand side by side and are asked in turn.

    bench/vllm_load.py FOLDER --plan plan.json --memory 64 --requests 24

Prints tokens that fit, seconds of each round, answered tokens a second by medians, and their ratio. The same by seconds of
processors, which others on the machine change less: all that the server's processes took.
"""

import argparse
import asyncio
import contextlib
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import openai


def start(given, log, plan):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", given.model, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", given.dtype, "--enforce-eager", "--block-size", "128",
        "--max-model-len", str(given.prompt + given.new), "--max-num-seqs", str(given.requests),
        "--kv-cache-memory-bytes", str(given.memory << 20),
    ]  # fmt: skip
    environment = dict(os.environ)
    if plan:
        command += ["--attention-backend", "CUSTOM"]
        environment |= {"KVMIX_PLAN": plan}
    with open(log, "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment), port


def wait(process, port, log):
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            if process.poll() is not None:
                sys.exit(f"a server ended:\n{log.read_text()[-3000:]}")
            time.sleep(1)


def processor_seconds(root):
    """Of a process and all below it."""
    parents, seconds = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def below(pid):
        return pid == root or (pid in parents and below(parents[pid]))

    return sum(taken for pid, taken in seconds.items() if below(pid))


async def burst(client, given, seed):
    """Seconds that all take; prompts are new each time, so that no cached prefix helps."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(100, given.vocabulary) for _ in range(given.prompt)] for _ in range(given.requests)]
    began = time.monotonic()
    answers = await asyncio.gather(
        *(
            client.completions.create(
                model=given.model, prompt=prompt, max_tokens=given.new, temperature=0, extra_body={"ignore_eos": True}
            )
            for prompt in prompts
        )
    )
    assert all(answer.usage.completion_tokens == given.new for answer in answers)
    return time.monotonic() - began


async def compare(given, servers):
    clients = {
        name: openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600)
        for name, (_, port, _) in servers.items()
    }
    seconds = {name: [] for name in servers}
    processors = {name: [] for name in servers}
    for turn in range(-1, given.rounds):  # the first warms up
        for name in sorted(servers, reverse=turn % 2 == 0):
            before = processor_seconds(servers[name][0].pid)
            took = await burst(clients[name], given, turn)
            processor = processor_seconds(servers[name][0].pid) - before
            if turn >= 0:
                seconds[name].append(took)
                processors[name].append(processor)
                print(f"round {turn} {name}: {took:.1f} s, {processor:.1f} s of processors", flush=True)
    answered = given.requests * given.new
    rate = {name: answered / statistics.median(all) for name, all in seconds.items()}
    by_processor = {name: answered / statistics.median(all) for name, all in processors.items()}
    for name, (_, _, log) in servers.items():
        fits = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text()).group(1)
        print(f"{name}: {fits} tokens fit, {rate[name]:.1f} tokens/s, {by_processor[name]:.1f} a second of processors")
    print(f"ratio {rate['kvmix'] / rate['stock']:.2f}, by processors {by_processor['kvmix'] / by_processor['stock']:.2f}")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", help="a folder as transformers writes it")
    arguments.add_argument("--plan", required=True)
    arguments.add_argument("--dtype", default="bfloat16")
    for name, value in (("memory", 64), ("requests", 24), ("prompt", 128), ("new", 128), ("rounds", 5), ("vocabulary", 40000)):
        arguments.add_argument(f"--{name}", type=int, default=value, help=f"({value}{' MiB' if name == 'memory' else ''})")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        servers = {}
        for name, plan in (("stock", None), ("kvmix", given.plan)):
            log = pathlib.Path(folder) / name
            process, port = start(given, log, plan)
            ends.callback(process.wait)
            ends.callback(process.send_signal, signal.SIGINT)
            servers[name] = (process, port, log)
        for process, port, log in servers.values():
            wait(process, port, log)
        asyncio.run(compare(given, servers))


if __name__ == "__main__":
    main()
