#!/usr/bin/env python3
"""Runs what bench/plan_tables.py shows: latents and fewer key channels beside bits, at equal bytes, as many processes of few threads.

    bench/rank_runs.py KVMIX MODELS TEXT PROFILES OUT [--device cuda --gpus 0,1] [--slots 16] [--threads 4] [--limit 900]
        [--only REGEX] [--print]

MODELS, PROFILES and OUT are as bench/token_runs.py has them. PROFILES/calib.txt, where it is there, is the text that factors and
joint plans are measured on. On a GPU rows of latents are left out, as they do not run there.
"""
import concurrent.futures
import pathlib
import subprocess

from plan_runs import F16, main

METHODS = ("palu", "recalkv", "lorc")
# Bits of all numbers, and what gives about as many: latents kept and their bits.
SPENT = {4: ((0.25, 16), (0.5, 8), (0.75, 5)), 2: ((0.25, 8), (0.5, 4))}
CLAIMS = {"palu": (0.5,), "recalkv": (0.5,), "lorc": (0.6,)}
THINK = (0.75, 0.5)
CHANNELS = (0.6, 0.5)
# Of the rows those whose passkeys are counted.
NEEDLES = {"r4": ("bits", "palu@0.75x5", "palu@0.5x8", "recalkv@0.75x5", "recalkv@0.5x8", "lorc@0.75x5", "think@0.75", "think@0.5"),
           "r2": ("bits", "palu@0.5x4", "recalkv@0.5x4", "lorc@0.5x4", "think@0.75", "think@0.5")}


def factors(args, model, method, keep):
    return f"{args.out}/factors/{model}-{method}-{keep:g}.gguf"


def keeps(method):
    kept = {keep for spent in SPENT.values() for keep, _ in spent} | set(CLAIMS[method])
    return sorted(kept | {1}) if method == "palu" else sorted(kept)


def prepare(runs, model, plans):
    args = runs.args
    words = [word for job in runs.jobs if job.model == model for word in job.words]
    words += [word for made in plans.values() if isinstance(made, str) for word in made.split()]
    cases = [(method, keep) for method in METHODS for keep in keeps(method) if factors(args, model, method, keep) in words]
    if not cases:
        return
    (runs.folder / "factors").mkdir(parents=True, exist_ok=True)

    def make(case):
        method, keep = case
        out = factors(args, model, method, keep)
        if pathlib.Path(out).exists():
            return
        words = [args.kvmix, "factorise", f"{args.models}/{model}.gguf", "--method", method, "--keep", str(keep), "-o", out,
                 "--threads", str(args.threads), "--quiet"]
        words += runs.calibration() if method != "lorc" else []
        # All latents are for ranks that a planner chooses; else ranks follow gradients, as Palu's paper has it.
        words += ["--profile", f"{args.profiles}/{model}.json"] if method == "palu" and keep < 1 else []
        done = subprocess.run(words, capture_output=True, text=True)
        pathlib.Path(out).with_suffix(".log").write_text(done.stdout + done.stderr)

    with concurrent.futures.ThreadPoolExecutor(max(1, args.slots // 2)) as pool:
        list(pool.map(make, cases))


def think(keep):
    def change(plan):
        plan["channels"] = {"policy": "think", "keep": keep}
        for layer in plan["layers"]:  # keys of fewer channels are not rounded with feedback
            layer["key"].pop("feedback", None)

    return change


def plans(model, args):
    """Name: arguments of kvmix plan, beside model and profile."""
    made = {}

    def latents(name, method, keep, bits):
        fp16 = " --recent f16" if bits == 16 else ""
        made[name] = f"--planner uniform --k-bits {bits} --v-bits {bits}{fp16} --factors {factors(args, model, method, keep)}"

    for budget, spent in SPENT.items():
        made[f"r{budget}-bits"] = f"--bits {budget} --context 4096"
        for method in METHODS:
            for keep, bits in spent:
                latents(f"r{budget}-{method}@{keep:g}x{bits}", method, keep, bits)
        for keep in THINK:
            # A key's channels go from a plan that has the bytes for them: both sides have as many numbers.
            made[f"r{budget}-think@{keep:g}"] = (f"--bits {budget * 2 / (1 + keep):.3f} --context 4096", think(keep))
    for method, kept in CLAIMS.items():
        for keep in kept:
            latents(f"claim-{method}@{keep:g}", method, keep, 16)
    for keep in CHANNELS:
        made[f"claim-think@{keep:g}"] = (F16, think(keep))
    if args.device == "cuda":
        made = {name: words for name, words in made.items() if name.endswith("-bits") or "think" in name}
    return made


def collect(runs, models):
    for model in models:
        big = model == "qwen"
        groups = {}
        for name in plans(model, runs.args):
            groups.setdefault(name.split("-")[0], []).append(name)
        for group, rows in groups.items():
            runs.text(model, group, rows, 1024 if big else 2048, 1 if big else 2, 256 if big else 512, part=1 if big else 2)
        for seed in range(10):
            for group, rows in NEEDLES.items():
                there = [f"{group}-{row}" for row in rows if f"{group}-{row}" in groups[group]]
                runs.needle(model, group, there, 512, seed, kinds="key,keys")
        if runs.on_gpu():
            continue
        runs.add("bench.r4", model, "bench --depths 1024 --tokens 16 --repetitions 3", [f"r4-{row}" for row in NEEDLES["r4"]], threads=8)
        for budget in SPENT:
            runs.axes(f"r{budget}-joint", model, budget, "tokens,bits,channels,rank", "--factors",
                      factors(runs.args, model, "palu", 1), seconds=1200)


main(__doc__, plans, collect, prepare)
