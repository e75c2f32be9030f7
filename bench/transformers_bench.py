#!/usr/bin/env python3
"""Decoding by kvmix.transformers.Generator against transformers' own best and its QuantizedCache, on one GPU.

    bench/transformers_bench.py --model llama-2-7b --context 8192 --gib 24

Random fp16 weights in the shape of the model. transformers: StaticCache, torch.compile with CUDA graphs, PyTorch's scaled dot
product attention, as many sequences as fit the memory. Ours: as many as fit the same memory, each with pages of its own, and as
many as theirs. The contenders of a model run one after the other, each with the memory that the one before has given back, and
medians of rounds are printed: milliseconds a step, tokens a second.
"""

import argparse
import gc
import statistics
import time

import torch
import transformers

import kvmix
from kvmix.transformers import Generator, model_shape

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
                   "num_hidden_layers": 32, "vocab_size": 32000},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "num_hidden_layers": 32, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 1000},
}  # fmt: skip


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_model(name, given):
    config = transformers.LlamaConfig(
        **{**SHAPES[name], **({"num_hidden_layers": given.layers} if given.layers else {})},
        max_position_embeddings=given.context, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float16 if given.device == "cuda" else torch.float32)
    with torch.device(given.device):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model


class Own:
    """transformers' StaticCache, compiled."""

    steps = 32

    def __init__(self, model, rows, given):
        self.model, self.start = model, given.context - self.steps - 1
        config = model.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=given.context)
        self.cache.early_initialization(
            rows, config.num_key_value_heads, config.head_dim, model.dtype, torch.device(given.device)
        )
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=given.device)
        self.positions = torch.zeros_like(self.tokens)

        def decode(tokens, positions):
            out = model(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
            return out.logits[:, -1:].argmax(-1), positions + 1

        self.decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)

    def run(self):
        self.model.config._attn_implementation = "sdpa"
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)
        self.positions.fill_(self.start)
        tokens, positions = self.tokens, self.positions
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()
            tokens, positions = (x.clone() for x in self.decode(tokens, positions))

    def bytes(self):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Ours:
    def __init__(self, model, plan, prompt, rows, given, graph=None, compile=None, steps=0):
        self.model, self.steps = model, steps or given.steps
        self.generator = Generator(model, plan, graph=graph, compile=compile)
        self.generator.prefill(prompt)
        self.generator.step()  # seals what the prompt left open, before there are many of it
        self.generator.repeat(rows, share=False)

    def run(self):
        self.model.config._attn_implementation = "kvmix"
        for _ in range(self.steps):
            self.generator.step()

    def bytes(self):
        memory = self.generator.cache.pages.memory()
        return memory["total_bytes"] + memory["scratch_bytes"]


class Quantized:
    """transformers' QuantizedCache, which dequantises all it has in each layer of a step."""

    steps = 4

    def __init__(self, model, prompt, rows, backend, bits):
        self.model = model
        options = {} if backend == "fp8" else {"nbits": bits}
        self.cache = transformers.QuantizedCache(backend=backend, config=model.config, **options)
        self.model.config._attn_implementation = "sdpa"
        out = model(prompt.expand(rows, -1), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = out.logits[:, -1:].argmax(-1)

    def run(self):
        self.model.config._attn_implementation = "sdpa"
        for _ in range(self.steps):
            out = self.model(self.tokens, past_key_values=self.cache, use_cache=True)
            self.tokens = out.logits[:, -1:].argmax(-1)

    def bytes(self):
        return 0  # it has no word for it


def measure(name, rows, contender, rounds):
    """Seconds a step and bytes of the cache; prints both."""
    seconds = []
    for turn in range(-1, rounds):  # the first warms up
        wait()
        began = time.perf_counter()
        contender.run()
        wait()
        if turn >= 0:
            seconds.append((time.perf_counter() - began) / contender.steps)
    step, held = statistics.median(seconds), contender.bytes()
    print(
        f"  {name:34} {rows:4} sequences  {1e3 * step:8.2f} ms a step  {rows / step:8.1f} tokens/s"
        + (f"  {held / 2**30:6.2f} GiB of cache" if held else ""),
        flush=True,
    )
    return step, held


def give_back():
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def bench(name, given):
    began = time.monotonic()
    model = make_model(name, given)
    config = model.config
    prompt_tokens = given.context - given.steps * (given.rounds + 1) - 16
    prompt = torch.randint(10, config.vocab_size, (1, prompt_tokens), device=given.device)
    memory = int(given.gib * 2**30)
    row_bytes = 2 * model.dtype.itemsize * given.context * config.num_key_value_heads * config.head_dim
    rows = memory // (row_bytes * config.num_hidden_layers)
    shape = model_shape(model)
    if given.plan:
        plan = kvmix.Plan.load(given.plan)
    else:
        plan = kvmix.Plan.uniform(shape, given.bits, given.bits, {"group": str(given.group)} if given.group else {})
    few = 8
    one = Ours(model, plan, prompt, few, given)
    held = one.generator.cache.pages.memory()
    pages = (held["total_bytes"] - held["slack_bytes"]) / few * given.context / prompt_tokens  # of one, in the end
    more = int((0.95 * memory - held["scratch_bytes"]) / pages)  # the pool holds some more than pages
    del one, held
    gc.collect()
    bits = given.plan or f"{given.bits} bits in groups of {given.group or 'keys 128, values 64'}"
    print(f"{name}, {config.num_hidden_layers} layers, context {given.context}, {bits}, {given.gib:g} GiB:", flush=True)
    own, _ = measure("transformers", rows, Own(model, rows, given), given.rounds)
    give_back()
    ours = [] if given.compiled else [("equal memory", more, {}), ("equal batch", rows, {})]
    for backend in given.compile:
        ours.append((f"equal memory, {backend}", more, {"compile": backend}))
        if given.compiled:
            ours.append((f"equal batch, {backend}", rows, {"compile": backend}))
    if given.eager:
        ours.append(("equal batch, no graph", rows, {"graph": False, "steps": 16}))
    took = {}
    for which, count, options in ours:
        while True:
            took[which], held = measure(f"kvmix, {which}", count, Ours(model, plan, prompt, count, given, **options), given.rounds)
            if held <= memory:
                break
            # What the pool took on the way counts as well: with fewer sequences, again.
            count = min(count - 1, int(count * memory / held))
            give_back()
        print(f"    {count / took[which] / (rows / own):.2f} times transformers' tokens/s", flush=True)
        give_back()
    for backend in given.quantized:
        quantized = Quantized(model, prompt, rows, backend, given.quantized_bits)
        step, _ = measure(f"QuantizedCache {backend}", rows, quantized, 2)
        print(f"    kvmix, equal batch: {step / next(v for k, v in took.items() if 'batch' in k):.2f} times its tokens/s", flush=True)
        del quantized
        give_back()
    print(f"  {time.monotonic() - began:.0f} s in all", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", action="append", choices=SHAPES, help="one or more (llama-2-7b and llama-3-8b)")
    arguments.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments.add_argument("--context", type=int, default=8192)
    arguments.add_argument("--layers", type=int, default=0, help="fewer than the model's")
    arguments.add_argument("--gib", type=float, default=24, help="of keys and values (24)")
    arguments.add_argument("--bits", type=int, default=2, help="of both sides in our plan (2)")
    arguments.add_argument("--group", type=int, default=0, choices=(32, 64, 128), help="of both sides in our plan (keys 128, values 64)")
    arguments.add_argument("--plan", help="a plan file for the model's shape instead")
    arguments.add_argument("--compiled", action="store_true", help="--compile: ours so alone")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=128, help="of ours in a round: as many as a page has tokens (128)")
    arguments.add_argument("--eager", action="store_true", help="our steps one by one as well")
    arguments.add_argument("--compile", action="append", default=[], help="ours at equal memory compiled by this backend as well: inductor")
    arguments.add_argument("--quantized", action="append", default=[], choices=("quanto", "hqq", "fp8"))
    arguments.add_argument("--quantized-bits", type=int, default=2, choices=(1, 2, 3, 4, 8))
    given = arguments.parse_args()
    what = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{what}, torch {torch.__version__}, transformers {transformers.__version__}, kvmix {kvmix.__version__}", flush=True)
    for name in given.model or ("llama-2-7b", "llama-3-8b"):
        bench(name, given)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
