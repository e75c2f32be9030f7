"""What bench/token_runs.py and bench/rank_runs.py share: plans of many kinds for several models, and commands over them, as many
processes of few threads, each of which leaves what it prints as JSON.
"""
import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import re
import shlex
import signal
import subprocess
import time

F16 = "--planner uniform --k-bits 16 --v-bits 16 --recent f16"


@dataclasses.dataclass
class Job:
    name: str
    model: str
    words: list  # the command but for its plans
    rows: list  # plans by name
    seconds: float


class Runs:
    def __init__(self, args):
        self.args = args
        self.folder = pathlib.Path(args.out)
        self.jobs = []
        self.gpus = queue.Queue()  # a GPU for each slot
        for _, gpu in zip(range(args.slots), itertools.cycle(args.gpus.split(","))):
            self.gpus.put(gpu)

    def on_gpu(self):
        return self.args.device == "cuda"

    def device(self):
        return ["--device", self.args.device] if self.on_gpu() else []

    def plan(self, model, name):
        return str(self.folder / "plans" / model / f"{name}.json")

    def add(self, name, model, command, rows, threads=None, seconds=3000):
        words = [self.args.kvmix, *shlex.split(command), "--json", "--quiet", "--threads", str(threads or self.args.threads)]
        words.insert(2, f"{self.args.models}/{model}.gguf")
        self.jobs.append(Job(f"{name}.{model}", model, words + self.device(), list(rows), seconds))

    def text(self, model, group, rows, context, windows, scored, text=None, part=2):
        command = f"eval --text {shlex.quote(text or self.args.text)} --context {context} --windows {windows} --scored {scored}"
        # A GPU rounds activations before it multiplies quantised weights, which would be most of what small divergences are.
        command += " --float-weights" if self.on_gpu() else ""
        for at in range(0, len(rows), part):
            self.add(f"text-{context}.{group}.{at}", model, command, rows[at:at + part])

    def needle(self, model, group, rows, context, seed, kinds="keys", trials=1, part=9):
        for at in range(0, len(rows), part):
            self.add(f"needle-{context}.{group}.{seed}.{at}", model,
                     f"eval --needle --contexts {context} --kinds {kinds} --trials {trials} --seed {seed}", rows[at:at + part])

    def generate(self, model, group, rows, prompts=4, prompt=2048, count=128):
        self.add(f"generate.{group}.0", model, f"eval --generate --text {shlex.quote(self.args.text)} --windows {prompts} "
                                                f"--prompt-tokens {prompt} --tokens {count}", rows)

    def calibration(self):
        """Arguments that name the text to measure on, where there is one; else the model writes it."""
        text = pathlib.Path(self.args.profiles) / "calib.txt"
        return ["--calib", str(text)] if text.exists() else []

    def axes(self, name, model, bits, axes, *more, seconds):
        """A plan of so many bits over several axes, whose command prints what each choice gave."""
        words = [self.args.kvmix, "plan", f"{self.args.models}/{model}.gguf", "--profile", f"{self.args.profiles}/{model}.json",
                 "--bits", str(bits), "--context", "4096", "--axes", axes, "--needles", "1", *more, "-o", self.plan(model, name),
                 "--json", "--quiet", "--threads", str(self.args.threads), *self.calibration()]
        self.jobs.append(Job(f"axes.{name.split('-')[0]}.{model}", model, words + self.device(), [], seconds))

    def make_plans(self, model, plans):
        """plans: by name, arguments of kvmix plan and, where a plan then wants what no option makes, a function that changes it."""
        profile = f"{self.args.profiles}/{model}.json"
        (self.folder / "plans" / model).mkdir(parents=True, exist_ok=True)

        def make(item):
            name, arguments = item
            arguments, change = arguments if isinstance(arguments, tuple) else (arguments, None)
            out = self.plan(model, name)
            if pathlib.Path(out).exists():
                return
            words = [self.args.kvmix, "plan", f"{self.args.models}/{model}.gguf", *shlex.split(arguments), "-o", out,
                     "--threads", "1", "--quiet", "--json"]
            words += self.device()
            if "--planner" not in words:
                words += ["--profile", profile]
            done = subprocess.run(words, capture_output=True, text=True)
            log = done.stdout if done.returncode == 0 else done.stderr
            pathlib.Path(out).with_suffix(".made" if done.returncode == 0 else ".lost").write_text(log)
            if change and done.returncode == 0:
                made = json.loads(pathlib.Path(out).read_text())
                change(made)
                pathlib.Path(out).write_text(json.dumps(made))

        with concurrent.futures.ThreadPoolExecutor(self.args.slots) as pool:
            list(pool.map(make, plans.items()))

    def run(self, start):
        def one(job):
            out, log = self.folder / f"{job.name}.json", self.folder / f"{job.name}.log"
            left = self.args.limit - (time.monotonic() - start) - 3
            made = [p for p in (self.plan(job.model, row) for row in job.rows) if pathlib.Path(p).exists()]
            if out.exists() or left < 5 or (job.rows and not made):
                return
            words = job.words + [word for p in made for word in ("--plan", p)]
            began = time.monotonic()
            gpu = self.gpus.get()
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if self.on_gpu() else None
            with open(log, "w") as errors:
                errors.write(shlex.join(words) + "\n")
                errors.flush()
                process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
                try:
                    said, _ = process.communicate(timeout=min(job.seconds, left))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT)
                    try:
                        said, _ = process.communicate(timeout=20)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        said, _ = process.communicate()
                self.gpus.put(gpu)
                errors.write(f"exit {process.returncode} after {time.monotonic() - began:.1f} s\n")
            try:
                json.loads(said)
            except ValueError:
                return
            temporary = out.with_suffix(".tmp")
            temporary.write_text(said)
            temporary.replace(out)
            print(f"{time.monotonic() - start:6.0f} s  {job.name}  {time.monotonic() - began:.0f} s", flush=True)

        with concurrent.futures.ThreadPoolExecutor(self.args.slots) as pool:
            list(pool.map(one, self.jobs))


def main(purpose, plans, collect, prepare=None):
    """plans(model, args): what make_plans takes; collect(runs, models): adds the commands, those that matter most first;
    prepare(runs, model, plans): what plans, of those that the commands want, and commands need beforehand."""
    parser = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kvmix", "models", "text", "profiles", "out"):
        parser.add_argument(name)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of plans and commands")
    parser.add_argument("--gpus", default="0", help="--device cuda: their numbers, such as 0,1; slots share them")
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--only", default="", help="of the commands those whose name matches this expression")
    parser.add_argument("--sources", default="src", help="folder of source code, the second kind of text of DBudgetKV")
    parser.add_argument("--print", action="store_true", help="the commands, without running them")
    args = parser.parse_args()
    start = time.monotonic()
    runs = Runs(args)
    runs.folder.mkdir(parents=True, exist_ok=True)
    models = [m for m in ("smollm2", "gemma3", "qwen") if pathlib.Path(f"{args.models}/{m}.gguf").exists()]
    if not models:
        raise SystemExit(f"{args.models} has none of smollm2.gguf, gemma3.gguf, qwen.gguf")
    collect(runs, models)
    runs.jobs = [job for job in runs.jobs if re.search(args.only, job.name)]
    if args.print:
        for job in runs.jobs:
            print(job.name, shlex.join(job.words + [word for row in job.rows for word in ("--plan", runs.plan(job.model, row))]))
        return
    wanted = {}
    for model in models:
        rows = {row for job in runs.jobs if job.model == model for row in job.rows}
        wanted[model] = {name: made for name, made in plans(model, args).items() if name in rows}
    if prepare:
        with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
            list(pool.map(lambda model: prepare(runs, model, wanted[model]), models))
    for model in models:
        runs.make_plans(model, wanted[model])
    print(f"{time.monotonic() - start:6.0f} s  plans", flush=True)
    runs.run(start)
