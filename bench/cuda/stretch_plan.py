#!/usr/bin/env python3
"""Stretches a plan over a model of another shape, for benchmarks on random weights (scripts/random-model): layers take the
widths, groups and row maps of the source's layers in order, evenly, and its numbers again and again. The quality of such a plan
means nothing; its bytes and its work are a real plan's.

    bench/cuda/stretch_plan.py plan.json --layers 32 --kv-heads 8 --head-dim 128 -o stretched.json
    kvmix bench llama-3-8b.gguf --plan stretched.json --force --device cuda
"""
import argparse
import base64
import itertools
import json


def resized(text, count, item):
    """base64 of `count` numbers of `item` bytes, taken from those of `text` in turn."""
    source = base64.b64decode(text)
    numbers = [source[i : i + item] for i in range(0, len(source), item)]
    return base64.b64encode(b"".join(itertools.islice(itertools.cycle(numbers), count))).decode()


def side(source, kv_heads, head_dim):
    made = dict(source)
    channels, pairs = kv_heads * head_dim, kv_heads * head_dim * (head_dim - 1) // 2
    for field, count in (("scales", channels), ("feedback", pairs)):
        if field in made:
            made[field] = resized(made[field], count, 2)
    if "center" in made:
        made["center"] = list(itertools.islice(itertools.cycle(made["center"]), channels))
    for field in set(made) - {"bits", "axis", "group", "fit", "zero_point", "codec", "hadamard", "scales", "center", "feedback"}:
        raise SystemExit(f"stretch_plan: {field} cannot be stretched; take a plan without it")
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    for name in ("layers", "kv-heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("-o", "--out", required=True)
    options = parser.parse_args()
    with open(options.plan) as file:
        plan = json.load(file)
    source = plan["layers"]
    plan["note"] = f"stretched from {plan['model']}: for benchmarks on random weights"
    plan["layers"] = [
        {name: side(source[layer * len(source) // options.layers][name], options.kv_heads, options.head_dim) for name in ("key", "value")}
        for layer in range(options.layers)
    ]
    with open(options.out, "w") as file:
        json.dump(plan, file)


main()
