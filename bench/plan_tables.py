#!/usr/bin/env python3
"""Prints tables of what bench/token_runs.py or bench/rank_runs.py wrote: bench/plan_tables.py OUT

docs/policies.md and docs/rank.md say what the rows are.
"""
import collections
import json
import math
import pathlib
import sys

NAMES = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M", "qwen": "Qwen2.5-Coder-1.5B"}


class Results:
    def __init__(self, folder):
        self.text = collections.defaultdict(list)  # (model, context, group, row): row objects
        self.needle = collections.defaultdict(list)  # (model, context, group, row): cells
        self.generate = {}  # (model, group, row): row
        heard = set()  # what every command measures again: haystacks of f16
        self.long, self.longtext, self.axes = {}, {}, {}
        self.bench = []  # (model, row)
        for path in sorted(pathlib.Path(folder).glob("*.json")):
            kind, group, *part, model = path.stem.split(".")
            kind, _, context = kind.partition("-")
            result = json.loads(path.read_text())
            if kind in ("text", "needle"):
                context = int(context)
            for row in result.get("rows", []):
                if row.get("lost"):
                    continue
                if kind == "text":
                    self.text[model, context, group, row["name"]].append(row)
                elif kind == "generate":
                    self.generate[model, group, row["name"]] = row
                elif kind == "bench":
                    self.bench.append((model, row))
                elif kind == "long":
                    self.long[row["name"]] = row
                elif kind == "longtext":
                    self.longtext[row["name"]] = row
            if kind == "axes":
                self.axes[model, group] = result
            for cell in result.get("cells", []) if kind == "needle" else []:
                haystack = (model, context, group, part[0], cell["kind"], cell["depth"])
                if cell["name"] == "f16" and haystack in heard:
                    continue
                if cell["name"] == "f16":
                    heard.add(haystack)
                self.needle[model, context, group, cell["name"]].append(cell)

    def models(self):
        return [m for m in NAMES if any(key[0] == m for key in [*self.text, *self.needle])]

    def rows(self, model, group):
        seen = []
        for store in (self.text, self.needle):
            for m, _, g, row in store:
                if m == model and g == group and row not in seen:
                    seen.append(row)
        return sorted(seen, key=lambda row: (row != "f16", order(row)))


def order(row):
    kinds = ("tokens", "bits", "least", "both")
    part = row.split("-")[1] if "-" in row else row
    return kinds.index(part) if part in kinds else 9, row


def interval(hits, trials):
    z, share = 1.96, hits / trials
    centre = share + z * z / (2 * trials)
    width = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def text_cells(rows):
    if not rows:
        return ["-"] * 4
    row = rows[0]
    return [f"{row['bits_per_element']:.2f}", f"{100 * row['kept']:.0f} %", f"{row['kl_mean']:.4f} ± {row['kl_stderr']:.4f}",
            f"{100 * row['top1']:.1f} %"]


def needle_cells(cells, kind="keys"):
    cells = [c for c in cells if c["kind"] == kind]
    hits, trials = sum(c["hits"] for c in cells), sum(c["trials"] for c in cells)
    if not trials:
        return ["-"] * 3
    low, high = interval(hits, trials)
    bits = sum(c.get("bits_per_element", 0) for c in cells) / len(cells)
    nll = sum(c["nll"] for c in cells) / len(cells)
    return [f"{bits:.2f}", f"{hits}/{trials} ({100 * low:.0f} to {100 * high:.0f} %)", f"{nll:.2f}"]


def table(header, rows):
    if not rows:
        print("(no runs)\n")
        return
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def quality(results, model, groups):
    """Rows of several groups; text of the longest context there is, passkeys at 4K and 8K, continuations."""
    contexts = sorted({key[1] for key in results.text if key[0] == model})
    out, shown = [], False
    for group in groups:
        for row in results.rows(model, group):
            if row == "f16" and shown:
                continue
            shown = shown or row == "f16"
            texts = [t for c in contexts for t in results.text.get((model, c, group, row), [])]
            cells = {c: results.needle.get((model, c, group, row), []) for c in (4096, 8192)}
            if row == "f16":  # of every group the same haystacks
                for c in cells:
                    cells[c] = [x for key, xs in results.needle.items() if key[0] == model and key[1] == c and key[3] == "f16"
                                and key[2] == group for x in xs]
            said = results.generate.get((model, group, row))
            agrees = f"{sum(said['agreement']) / len(said['agreement']):.1f}" if said else "-"
            many = group.rpartition("-")[2]
            kinds = ("key", many if many in ("quote", "word") else "keys")
            found = [needle_cells(cells[c], kind) for c in (4096, 8192) for kind in kinds]
            bits = next((f[0] for f in found if f[0] != "-"), "-")
            out.append([row, *text_cells(texts), bits, found[0][1], *found[1][1:], found[2][1], *found[3][1:], agrees])
    return out


QUALITY = ["row", "bits, text", "kept", "mean KL", "top-1", "bits, 4K", "key at 4K", "keys at 4K", "nll", "key at 8K", "keys at 8K",
           "nll", "agrees for"]


def axes_lines(results):
    for (model, group), made in sorted(results.axes.items()):
        held = made["held_out"]
        alone = f", bits alone {held['bits_alone']:.4f}" if "bits_alone" in held else ""
        print(f"- `--axes` at {group[1:]} bits, {NAMES[model]}: {made['why']}; held-out KL {held['kl_mean']:.4f}{alone}")
        for tried in made["axes"]:
            name = ", ".join(tried[axis] for axis in ("tokens", "channels", "ranks") if axis in tried)
            name = f"**{name}**" if tried["chosen"] else name
            found = f", passkeys {100 * tried['passkeys']:.0f} %" if "passkeys" in tried else ""
            print(f"  - {name}: {tried.get('lost') or format(tried['kl_mean'], '.4f')}{found}")
    print()


def ranks(results):
    """Latents and key channels beside bits: text of 2,048 tokens (Qwen 1,024), passkeys among 512."""
    for model in results.models():
        rows = []
        for group in ("r4", "r2", "claim"):
            for row in results.rows(model, group):
                texts = [t for context in (1024, 2048) for t in results.text.get((model, context, group, row), [])]
                perplexity = f"{texts[0]['perplexity']:.2f}" if texts else "-"
                cells = results.needle.get((model, 512, group, row), [])
                speed = [f"{r['decode_tokens_per_s']:.1f}" for m, r in results.bench if m == model and r["name"] == row]
                found = [*needle_cells(cells, "key")[1:2], *needle_cells(cells)[1:]]
                rows.append([row, *text_cells(texts), perplexity, *found, *(speed or ["-"])[:1]])
        print(f"{NAMES[model]}\n")
        table(["row", "bits", "kept", "mean KL", "top-1", "perplexity", "key", "keys", "nll", "tokens/s"], rows)
    axes_lines(results)


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    results = Results(sys.argv[1])
    if any(key[2] in ("r4", "r2", "claim") for key in [*results.text, *results.needle]):
        ranks(results)
        return
    print("## 1. Equal bytes\n")
    for model in results.models():
        print(f"{NAMES[model]}\n")
        table(QUALITY, quality(results, model, ["b4", "b2", "b1"]))
    axes_lines(results)
    print("\n## 2. Claims\n")
    for model in results.models():
        for title, groups in (("Quantized pruning", ["qp"]), ("LeanKV", ["lean"]), ("KVCrush", ["crush"]),
                              ("DBudgetKV: text, source code, haystacks by kind",
                               ["dbudget", "dbudget-code", "dbudget-key", "dbudget-keys", "dbudget-quote", "dbudget-word"])):
            rows = []
            for group in groups:
                for row in quality(results, model, [group]):
                    kept = row[2]
                    if kept == "-":
                        cells = results.needle.get((model, 4096, group, row[0]), [])
                        kept = f"{100 * sum(c['kept'] for c in cells) / len(cells):.0f} %" if cells else "-"
                    rows.append([group, row[0], row[1], kept, *row[3:9]])
            if rows:
                print(f"{title}, {NAMES[model]}\n")
                table(["group", "row", "bits, text", "kept", "mean KL", "top-1", "bits, 4K", "key at 4K", "keys at 4K", "nll"], rows)
    print("## 3. Speed at 8,160 tokens\n")
    table(["row", "decode tokens/s", "least", "most", "prefill tokens/s", "cache MiB"],
          [[r["name"], f"{r['decode_tokens_per_s']:.1f}", f"{r['decode_min']:.1f}", f"{r['decode_max']:.1f}",
            f"{r['prefill_tokens_per_s']:.0f}", f"{r['cache_bytes'] / 2**20:.1f}"] for _, r in results.bench])
    print("## 4. 4,096 tokens after a prompt of 4,096\n")
    rows = []
    for name in sorted({*results.long, *results.longtext}, key=lambda n: (n != "f16", n)):
        cells = [name]
        course = results.long.get(name, {}).get("course", [])
        if course:
            at = [course[0], course[len(course) // 2], course[-1]]
            cells += [" / ".join(f"{p['cache_bytes'] / 2**20:.2f}" for p in at), f"{max(p['cache_bytes'] for p in course) / 2**20:.2f}",
                      " / ".join(f"{p['tokens_per_s']:.1f}" for p in at), f"{100 * results.long[name]['repetition'][0]:.0f} %"]
        else:
            cells += ["-"] * 4
        text = results.longtext.get(name)
        cells += [f"{text['perplexity']:.2f}", f"{text['kl_mean']:.4f}", f"{100 * text['top1']:.1f} %"] if text else ["-"] * 3
        rows.append(cells)
    table(["row", "MiB first / middle / last", "most", "tokens/s first / middle / last", "repeated", "perplexity of text", "mean KL", "top-1"], rows)


main()
