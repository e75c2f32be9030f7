#!/usr/bin/env python3
"""Runs what bench/token_tables.py shows: rows of the token axis beside bits, as many processes of few threads.

    bench/token_runs.py KVMIX MODELS TEXT PROFILES OUT [--slots 16] [--threads 4] [--limit 900] [--only REGEX] [--print]

MODELS holds smollm2.gguf, gemma3.gguf, qwen.gguf (those that are there are run), PROFILES their profiles NAME.json, OUT takes
a .json and a .log for each run; one whose .json is there is not run again. What matters most comes first, and at the limit
(seconds) what still runs is interrupted: it writes the rows that are complete.
"""
import argparse
import concurrent.futures
import json
import pathlib
import re
import shlex
import signal
import subprocess
import time

BUDGETS = {4: 0.25, 2: 0.125, 1: 0.0625}  # bits of all tokens, and the part of them that these are at 16
# Positions of tokens that stay take 4 bytes a head: what is kept at 16 bits is so much less than its share.
POSITIONS = 0.97
BOTH = {4: ("snapkv keep=0.5", "adakv keep=0.5"), 2: ("snapkv keep=0.5", "adakv keep=0.25"),
        1: ("snapkv keep=0.25", "adakv keep=0.125")}
F16 = "--planner uniform --k-bits 16 --v-bits 16 --recent f16"


def tokens(policy, more=""):
    return f"--tokens {shlex.quote((policy + ' ' + more).strip())}"


def plans(model):
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
    return made


class Runs:
    def __init__(self, args):
        self.args = args
        self.folder = pathlib.Path(args.out)
        self.jobs = []

    def plan(self, model, name):
        return str(self.folder / "plans" / model / f"{name}.json")

    def add(self, name, model, command, rows, threads=None, seconds=600):
        made = [self.plan(model, row) for row in rows]
        missing = [p for p in made if not pathlib.Path(p).exists()]
        if missing and len(missing) == len(made) > 0:
            return
        words = [self.args.kvmix, *shlex.split(command), "--json", "--quiet", "--threads", str(threads or self.args.threads)]
        words.insert(2, f"{self.args.models}/{model}.gguf")
        for p in made:
            if p not in missing:
                words += ["--plan", p]
        self.jobs.append((f"{name}.{model}", words, seconds))

    def text(self, model, group, rows, context, windows, scored, text=None, part=2):
        for at in range(0, len(rows), part):
            self.add(f"text-{context}.{group}.{at}", model,
                     f"eval --text {shlex.quote(text or self.args.text)} --context {context} --windows {windows} --scored {scored}",
                     rows[at:at + part])

    def needle(self, model, group, rows, context, seed, kinds="keys", trials=1):
        self.add(f"needle-{context}.{group}.{seed}", model,
                 f"eval --needle --contexts {context} --kinds {kinds} --trials {trials} --seed {seed}", rows)

    def generate(self, model, group, rows, prompts=4, prompt=2048, count=128):
        self.add(f"generate.{group}.0", model, f"eval --generate --text {shlex.quote(self.args.text)} --windows {prompts} "
                                                f"--prompt-tokens {prompt} --tokens {count}", rows)

    def make_plans(self, model):
        profile = f"{self.args.profiles}/{model}.json"
        (self.folder / "plans" / model).mkdir(parents=True, exist_ok=True)

        def make(item):
            name, arguments = item
            out = self.plan(model, name)
            if pathlib.Path(out).exists():
                return
            words = [self.args.kvmix, "plan", f"{self.args.models}/{model}.gguf", *shlex.split(arguments), "-o", out,
                     "--threads", "1", "--quiet", "--json"]
            if "--planner" not in words:
                words += ["--profile", profile]
            done = subprocess.run(words, capture_output=True, text=True)
            log = done.stdout if done.returncode == 0 else done.stderr
            pathlib.Path(out).with_suffix(".made" if done.returncode == 0 else ".lost").write_text(log)

        with concurrent.futures.ThreadPoolExecutor(self.args.slots) as pool:
            list(pool.map(make, plans(model).items()))

    def budget_rows(self, bits, few):
        kinds = ["tokens-snapkv", "bits" if bits > 1 else "least"]
        both = [f"both-{p.replace(' keep=', '@')}" for p in BOTH[bits]]
        rows = kinds + both[:1] if few else kinds + both + ["tokens-adakv"]
        return [f"b{bits}-{row}" for row in rows]

    def axes(self, model, bits):
        name = f"axes.b{bits}.{model}"
        words = [self.args.kvmix, "plan", f"{self.args.models}/{model}.gguf", "--profile", f"{self.args.profiles}/{model}.json",
                 "--bits", str(bits), "--context", "4096", "--axes", "tokens,bits", "--needles", "1", "-o",
                 self.plan(model, f"b{bits}-axes"), "--json", "--quiet", "--threads", str(self.args.threads)]
        calibration = pathlib.Path(self.args.profiles) / "calib.txt"
        if calibration.exists():
            words += ["--calib", str(calibration)]
        self.jobs.append((name, words, 800))

    def collect(self, models):
        small = [m for m in models if m != "qwen"]
        code = self.folder / "code.txt"
        sources = sorted(pathlib.Path(self.args.sources).rglob("*.cc"))
        code.write_text("\n".join(s.read_text() for s in sources)[:400_000] or "no sources\n")
        if "smollm2" in models:
            self.add("bench.0", "smollm2", "bench --depths 8160 --tokens 16 --repetitions 5 --peer --peer-types f16",
                     ["k3", "k4", "k4-snapkv@0.25", "k4-mass", "k4-mass-of-every", "k4-h2o@0.25", "leankv"], threads=8)
        if "qwen" in models:
            for bits in BUDGETS:
                self.text("qwen", f"b{bits}", self.budget_rows(bits, True), 2048, 1, 256, part=3)
                self.needle("qwen", f"b{bits}", self.budget_rows(bits, True), 4096, 0)
        for model in small:
            for bits in BUDGETS:
                self.text(model, f"b{bits}", self.budget_rows(bits, False) + [f"b{bits}-tokens-kvcrush"], 4096, 4, 512)
        for seed in range(5):
            for model in small:
                for bits in BUDGETS:
                    self.needle(model, f"b{bits}", self.budget_rows(bits, False), 4096, seed)
        if "smollm2" in models:
            for row in ("long-window", "long-h2o", "long-leankv"):
                self.add(f"long.{row}", "smollm2", f"eval --generate --text {shlex.quote(self.args.text)} --windows 1 "
                                                    "--prompt-tokens 4096 --tokens 4096", [row])
                self.add(f"longtext.{row}", "smollm2", f"eval --text {shlex.quote(self.args.text)} --context 8192 --windows 2",
                         [row])
        for model in small:
            for bits in BUDGETS:
                self.generate(model, f"b{bits}", self.budget_rows(bits, False))
        qp = [f"qp-{part}-{x}" for part in ("8th", "16th") for x in ("1x16", "2x8", "4x4")]
        lean = ["lean-1-0.02", "lean-1-0.1", "lean-1-0.3", "lean-2-0.5"]
        crush = ["crush-host", "crush-alternate", "crush-mean", "crush-random"]
        dbudget = ["dbudget-0.01", "dbudget-0.05"]
        for model in small[:1]:
            for group, rows in (("qp", qp), ("lean", lean), ("crush", crush)):
                self.text(model, group, rows, 4096, 3, 512)
            self.text(model, "dbudget", dbudget, 4096, 3, 512)
            self.text(model, "dbudget-code", dbudget, 4096, 3, 512, text=str(code))
            for kind in ("key", "keys", "quote", "word"):
                self.needle(model, f"dbudget-{kind}", dbudget, 4096, 0, kinds=kind)
            for seed in range(5):
                for group, rows in (("qp", qp), ("lean", lean), ("crush", crush)):
                    self.needle(model, group, rows, 4096, seed)
        for model in small:
            for bits in BUDGETS:
                self.axes(model, bits)
        for seed in range(4):
            for model in small:
                for bits in BUDGETS:
                    self.needle(model, f"b{bits}", self.budget_rows(bits, False), 8192, seed)
            if "qwen" in models and seed in (1, 2):
                for bits in BUDGETS:
                    self.needle("qwen", f"b{bits}", self.budget_rows(bits, True), 4096, seed)
        for seed in range(5, 50):
            for model in small:
                for bits in BUDGETS:
                    self.needle(model, f"b{bits}", self.budget_rows(bits, False), 4096, seed)
                for group, rows in (("qp", qp), ("lean", lean), ("crush", crush)) if model == small[0] and seed < 10 else ():
                    self.needle(model, group, rows, 4096, seed)
            for model in small if seed < 10 else ():
                for bits in BUDGETS:
                    self.needle(model, f"b{bits}", self.budget_rows(bits, False), 8192, seed)

    def run(self, start):
        def one(job):
            name, words, seconds = job
            out, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
            left = self.args.limit - (time.monotonic() - start) - 3
            if out.exists() or left < 5:
                return
            began = time.monotonic()
            with open(log, "w") as errors:
                errors.write(shlex.join(words) + "\n")
                errors.flush()
                process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
                try:
                    said, _ = process.communicate(timeout=min(seconds, left))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT)
                    try:
                        said, _ = process.communicate(timeout=20)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        said, _ = process.communicate()
                errors.write(f"exit {process.returncode} after {time.monotonic() - began:.1f} s\n")
            try:
                json.loads(said)
            except ValueError:
                return
            temporary = out.with_suffix(".tmp")
            temporary.write_text(said)
            temporary.replace(out)
            print(f"{time.monotonic() - start:6.0f} s  {name}  {time.monotonic() - began:.0f} s", flush=True)

        with concurrent.futures.ThreadPoolExecutor(self.args.slots) as pool:
            list(pool.map(one, self.jobs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kvmix", "models", "text", "profiles", "out"):
        parser.add_argument(name)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--only", default="")
    parser.add_argument("--sources", default="src", help="folder of source code, the second kind of text of DBudgetKV")
    parser.add_argument("--print", action="store_true", help="the commands, without running them")
    args = parser.parse_args()
    start = time.monotonic()
    runs = Runs(args)
    runs.folder.mkdir(parents=True, exist_ok=True)
    models = [m for m in ("smollm2", "gemma3", "qwen") if pathlib.Path(f"{args.models}/{m}.gguf").exists()]
    if not models:
        raise SystemExit(f"{args.models} has none of smollm2.gguf, gemma3.gguf, qwen.gguf")
    for model in models:
        runs.make_plans(model)
    print(f"{time.monotonic() - start:6.0f} s  plans", flush=True)
    runs.collect(models)
    runs.jobs = [job for job in runs.jobs if re.search(args.only, job[0])]
    if args.print:
        for name, words, _ in runs.jobs:
            print(name, shlex.join(words))
        return
    runs.run(start)


main()
