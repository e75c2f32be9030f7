"""From a model to a plan under a budget, and what it costs: the README's five commands in Python.

    python examples/python/plan_and_evaluate.py MODEL.gguf TEXT.txt [BITS]
"""

import pathlib
import sys

import kvmix


def report(done, total, what):
    print(f"\r{what}: {100 * done / max(total, 1e-9):3.0f} %", end="", file=sys.stderr)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model = kvmix.Model(sys.argv[1])
    text = pathlib.Path(sys.argv[2]).read_text()
    bits = float(sys.argv[3]) if len(sys.argv) > 3 else 3.0

    profile = kvmix.profile(model, tokens=512, progress=report)
    plan = kvmix.plan(model, profile, bits=bits, context=2048)
    plans = {"planned": plan, "uniform 4/4": kvmix.Plan.uniform(model.shape, 4, 4)}
    rows = kvmix.evaluate(model, text, plans, context=1024, windows=2, progress=report)
    print(f"\n{'cache':14} {'bits':>6} {'bytes':>10} {'mean KL':>8} {'top-1':>7}")
    for row in rows:
        print(f"{row.name:14} {row.bits_per_element:6.2f} {row.cache_bytes:10} {row.kl_mean:8.4f} {100 * row.top1:6.2f} %")

    prompt = model.tokenize("The tide")
    model.generate(prompt, plan, max_tokens=40, temperature=0, on_text=lambda t: print(t, end="", flush=True))
    print()


main()
