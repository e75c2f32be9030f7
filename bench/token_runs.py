#!/usr/bin/env python3
"""Runs what bench/plan_tables.py shows: rows of the token axis beside bits, as many processes of few threads.

    bench/token_runs.py KVMIX MODELS TEXT PROFILES OUT [--device cuda --gpus 0,1] [--slots 16] [--threads 4] [--limit 900]
        [--only REGEX] [--print]

MODELS holds smollm2.gguf, gemma3.gguf, qwen.gguf (those that are there are run), PROFILES their profiles NAME.json, OUT takes
a .json and a .log for each run; one whose .json is there is not run again. What matters most comes first, and at the limit
(seconds) what still runs is interrupted: it writes the rows that are complete. On GPUs there are ten times the passkeys and twice
the text, and no rows of policies that the device does not carry out (kvmix list).
"""
import pathlib
import shlex

from plan_runs import F16, main

BUDGETS = {4: 0.25, 2: 0.125, 1: 0.0625}  # bits of all tokens, and the part of them that these are at 16
# Positions of tokens that stay take 4 bytes a head: what is kept at 16 bits is so much less than its share.
POSITIONS = 0.97
BOTH = {4: ("snapkv keep=0.5", "adakv keep=0.5"), 2: ("snapkv keep=0.5", "adakv keep=0.25"),
        1: ("snapkv keep=0.25", "adakv keep=0.125")}


def tokens(policy, more=""):
    return f"--tokens {shlex.quote((policy + ' ' + more).strip())}"


def plans(model, args):
    """Name: arguments of kvmix plan, beside model and profile."""
    made = {"f16-all": F16}
    for bits, keep in BUDGETS.items():
        keep = f"keep={keep * POSITIONS:.4f}"
        for policy in ("snapkv", "adakv", "kvcrush"):
            made[f"b{bits}-tokens-{policy}"] = f"{F16} {tokens(policy, keep)}"
        made[f"b{bits}-bits"] = f"--bits {bits} --context 4096"
        for policy in BOTH[bits]:
            name = policy.replace(" keep=", "@")
            made[f"b{bits}-both-{name}"] = f"--bits {bits} --context 4096 {tokens(policy)}"
    made["b1-least"] = "--planner uniform --k-bits 1 --v-bits 1"
    for keep, name in ((0.125, "8th"), (0.0625, "16th")):
        for times, bits in ((1, 16), (2, 8), (4, 4)):
            made[f"qp-{name}-{times}x{bits}"] = F16 + " " + tokens("quantized-pruning", f"keep={keep} k-bits={bits} v-bits={bits}")
    for high, low in ((1, 0.02), (1, 0.1), (1, 0.3), (2, 0.5)):
        made[f"lean-{high}-{low}"] = F16 + " " + tokens("leankv", f"high={high} low={low}")
    for threshold in (0.01, 0.05):
        made[f"dbudget-{threshold}"] = F16 + " " + tokens("dbudgetkv", f"threshold={threshold}")
    made["crush-host"] = F16 + " " + tokens("kvcrush", "keep=0.25 share=0")
    for anchor in ("alternate", "mean", "random"):
        made[f"crush-{anchor}"] = F16 + " " + tokens("kvcrush", f"keep=0.25 share=0.25 anchor={anchor}")
    made["k3"] = "--bits 3 --context 8192"
    made["k4"] = "--planner uniform"
    made["k4-snapkv@0.25"] = "--planner uniform " + tokens("snapkv", "keep=0.25")
    made["k4-mass"] = "--planner uniform " + tokens("h2o", "keep=1")
    made["k4-mass-of-every"] = "--planner uniform " + tokens("h2o", "keep=1 every=1")
    made["k4-h2o@0.25"] = "--planner uniform " + tokens("h2o", "keep=0.25")
    made["leankv"] = F16 + " " + tokens("leankv")
    bound = "tokens=1024"
    made["long-window"] = "--planner uniform " + tokens("streaming", bound + " sinks=4 decode=evict")
    made["long-h2o"] = "--planner uniform " + tokens("h2o", bound)
    made["long-leankv"] = F16 + " " + tokens("leankv", "low=0.3")
    if args.device == "cuda":
        made = {name: words for name, words in made.items() if "h2o" not in words and "leankv" not in words}
    return made


def budget_rows(bits, few):
    kinds = ["tokens-snapkv", "bits" if bits > 1 else "least"]
    both = [f"both-{p.replace(' keep=', '@')}" for p in BOTH[bits]]
    rows = kinds + both[:1] if few else kinds + both + ["tokens-adakv"]
    return [f"b{bits}-{row}" for row in rows]


def all_rows(bits):
    return budget_rows(bits, False) + [f"b{bits}-tokens-kvcrush"]


def collect_on_gpu(runs, models):
    """What takes a CPU hours: all budgets of all models, 50 passkeys a cell at two lengths, continuations."""
    def needles(model, group, rows, kinds="key,keys", part=3):
        for context in (4096, 8192):
            runs.needle(model, group, rows, context, 0, kinds=kinds, trials=10, part=part)

    for model in models:
        for bits in BUDGETS:
            runs.text(model, f"b{bits}", all_rows(bits), 4096, 8, 512, part=3)
    for model in models:
        for bits in BUDGETS:
            needles(model, f"b{bits}", all_rows(bits))
    for model in models:
        for bits in BUDGETS:
            runs.generate(model, f"b{bits}", all_rows(bits), prompts=16)
    claims(runs, models[:1], windows=8, trials=10, needle=needles)
    for model in models:
        for bits in BUDGETS:
            runs.axes(f"b{bits}-axes", model, bits, "tokens,bits", seconds=300)
    long_generations(runs, ["long-window"])


def claims(runs, models, windows, trials, needle):
    qp = [f"qp-{part}-{x}" for part in ("8th", "16th") for x in ("1x16", "2x8", "4x4")]
    lean = ["lean-1-0.02", "lean-1-0.1", "lean-1-0.3", "lean-2-0.5"]
    crush = ["crush-host", "crush-alternate", "crush-mean", "crush-random"]
    dbudget = ["dbudget-0.01", "dbudget-0.05"]
    code = runs.folder / "code.txt"
    sources = sorted(pathlib.Path(runs.args.sources).rglob("*.cc"))
    code.write_text("\n".join(s.read_text() for s in sources)[:400_000] or "no sources\n")
    for model in models:
        for group, rows in (("qp", qp), ("lean", lean), ("crush", crush)):
            runs.text(model, group, rows, 4096, windows, 512)
        runs.text(model, "dbudget", dbudget, 4096, windows, 512)
        runs.text(model, "dbudget-code", dbudget, 4096, windows, 512, text=str(code))
        for kind in ("key", "keys", "quote", "word"):
            runs.needle(model, f"dbudget-{kind}", dbudget, 4096, 0, kinds=kind, trials=trials)
        for group, rows in (("qp", qp), ("lean", lean), ("crush", crush)):
            needle(model, group, rows)


def long_generations(runs, rows):
    for row in rows:
        runs.add(f"long.{row}", "smollm2", f"eval --generate --text {shlex.quote(runs.args.text)} --windows 1 "
                                            "--prompt-tokens 4096 --tokens 4096", [row])
        runs.add(f"longtext.{row}", "smollm2", f"eval --text {shlex.quote(runs.args.text)} --context 8192 --windows 2", [row])


def collect(runs, models):
    if runs.on_gpu():
        collect_on_gpu(runs, models)
        return
    small = [m for m in models if m != "qwen"]
    if "smollm2" in models:
        runs.add("bench.0", "smollm2", "bench --depths 8160 --tokens 16 --repetitions 5 --peer --peer-types f16",
                 ["k3", "k4", "k4-snapkv@0.25", "k4-mass", "k4-mass-of-every", "k4-h2o@0.25", "leankv"], threads=8)
    if "qwen" in models:
        for bits in BUDGETS:
            runs.text("qwen", f"b{bits}", budget_rows(bits, True), 2048, 1, 256, part=3)
            runs.needle("qwen", f"b{bits}", budget_rows(bits, True), 4096, 0)
    for model in small:
        for bits in BUDGETS:
            runs.text(model, f"b{bits}", all_rows(bits), 4096, 4, 512)
    if "smollm2" in models:
        long_generations(runs, ("long-window", "long-h2o", "long-leankv"))
    for seed in range(10) if small else ():
        for model in small:
            for bits in BUDGETS:
                runs.needle(model, f"b{bits}", budget_rows(bits, False), 4096, seed)
    claims(runs, small[:1], windows=3, trials=1,
           needle=lambda model, group, rows: [runs.needle(model, group, rows, 4096, seed) for seed in range(10)])
    for model in small:
        for bits in BUDGETS:
            runs.generate(model, f"b{bits}", budget_rows(bits, False))
    for model in small:
        for bits in BUDGETS:
            runs.axes(f"b{bits}-axes", model, bits, "tokens,bits", seconds=800)
    for seed in range(10):
        for model in small:
            for bits in BUDGETS:
                runs.needle(model, f"b{bits}", budget_rows(bits, True), 8192, seed)
        for bits in BUDGETS if "qwen" in models and seed else ():
            runs.needle("qwen", f"b{bits}", budget_rows(bits, True), 4096, seed)


main(__doc__, plans, collect)
