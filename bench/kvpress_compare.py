#!/usr/bin/env python3
"""What a cache costs a transformers model: kvpress' token dropping, transformers' QuantizedCache and plans of KVmix, at their real bytes.

    bench/kvpress_compare.py MODEL.gguf TEXT --presses --out presses.json
    bench/kvpress_compare.py MODEL.gguf TEXT --quantized 4 --out quantized.json
    bench/kvpress_compare.py MODEL.gguf TEXT --plan bits=plan.json --out plans.json
    bench/kvpress_compare.py --report presses.json quantized.json plans.json

kvpress 0.5.5 wants transformers older than 5.3 and kvmix.transformers a newer one, so these are environments of their own (both with gguf and
accelerate; the first with kvpress and optimum-quanto). Weights are the GGUF file's in fp32. Of each window the last 512 tokens are scored, behind a prompt of all
that stands before, by their divergence from the model with its own full cache. Sizes are parts of the full cache's in fp16, where the
prompt ends and where the window does: what is not kept is not counted, even where kvpress only masks it, nor are lists of what is. All
methods read the prompt in one piece and then 128 tokens at a time, of which kvpress keeps all as they are; plans pack them too.
"""

import argparse
import json
import pathlib
import statistics
import tempfile

import torch
import transformers
from transformers import DynamicCache

SCORED, CHUNK = 512, 128


def load(path):
    """Model and tokenizer of a GGUF file; kvpress looks for the tokenizer beside the model."""
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    tokenizer.chat_template = None  # windows are plain text
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    return model, tokenizer


def full_bytes(model, tokens):
    """Of keys and values in fp16."""
    config = model.config
    return 4 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def prefill(model, window, cache):
    model(window[:, :-SCORED], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def read(model, window, cache, bytes=lambda cache: 0):
    """Bytes once a prompt was read and the next token packed what of it is packed; and log probabilities after each of the scored
    tokens, [SCORED, vocabulary]."""
    begin = window.shape[1] - SCORED
    ends = [begin + 1, *range(begin + CHUNK, window.shape[1] + 1, CHUNK)]
    rows, size = [], 0
    for first, end in zip([begin, *ends], ends):
        positions = torch.arange(first, end)[None]  # the cache may hold fewer tokens than have come
        out = model(window[:, first:end], past_key_values=cache, position_ids=positions, use_cache=True)
        rows.append(out.logits[0].log_softmax(-1))
        if first == begin:
            size = bytes(cache)
    return size, torch.cat(rows)


def cache_of(rows):
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(rows):
        cache.update(keys, values, layer)
    return cache


class Presses:
    """kvpress: each press on the rows of one prefill, since all choose after a layer has attended."""

    def __init__(self, model, tokenizer, parts):
        import kvpress
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.model, self.parts = model, parts
        self.folder = tempfile.TemporaryDirectory()
        tokenizer.save_pretrained(self.folder.name)
        model.config.name_or_path = self.folder.name  # where KVzip asks for it
        ALL_ATTENTION_FUNCTIONS.register("masked", masked_attention)

        def expected(ratio, epsilon):
            return kvpress.ExpectedAttentionPress(ratio, epsilon=epsilon)

        makers = {
            "StreamingLLM": kvpress.StreamingLLMPress,
            "TOVA": kvpress.TOVAPress,
            "SnapKV": kvpress.SnapKVPress,
            "PyramidKV": kvpress.PyramidKVPress,
            "ExpectedAttention": lambda ratio: expected(ratio, 0.0),
            "Ada-KV of SnapKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
            "Ada-KV of ExpectedAttention": lambda ratio: kvpress.AdaKVPress(expected(ratio, 1e-2)),
        }
        outer = self

        class All(kvpress.BasePress):
            def post_init_from_model(self, model):
                self.presses = {(name, part): make(1 - part) for name, make in makers.items() for part in parts}
                for press in self.presses.values():
                    press.post_init_from_model(model)

            def compress(self, module, hidden, keys, values, attentions, kwargs):
                for key, press in self.presses.items():
                    module.masked_key_indices = None
                    kept = press.compress(module, hidden, keys, values, attentions, kwargs)
                    outer.rows.setdefault(key, []).append((kept, module.masked_key_indices))
                module.masked_key_indices = None
                return keys, values

        class Zip(kvpress.KVzipPress):
            def compress_post(self, model):
                for part in parts:
                    self.compression_ratio = 1 - part
                    super().compress_post(model)
                    for layer, rows in zip(model.model.layers, outer.full):
                        outer.rows.setdefault(("KVzip", part), []).append((rows, layer.self_attn.masked_key_indices))
                        layer.self_attn.masked_key_indices = None

        self.all, self.zip = All(), Zip(0.5)

    def run(self, window):
        """(name, bytes where the prompt ends and where the window does, log probabilities) of each; the full cache first."""
        self.rows = {}
        self.model.set_attn_implementation("sdpa")
        with self.all(self.model):
            cache = prefill(self.model, window, DynamicCache())
        self.full = [(layer.keys, layer.values) for layer in cache.layers]
        yield "full", 0, 0, read(self.model, window, cache)[1]
        with self.zip(self.model):
            self.zip._context_ids, self.zip._cache = window[:, :-SCORED], cache_of(self.full)
        for (name, _), rows in self.rows.items():
            kept = 0
            for layer, ((keys, _), masked) in zip(self.model.model.layers, rows):
                layer.self_attn.masked_key_indices = masked
                kept += keys.shape[1] * keys.shape[2] - (0 if masked is None else len(masked[2]))
            size = 4 * kept * self.model.config.head_dim
            self.model.set_attn_implementation("sdpa" if rows[0][1] is None else "masked")
            _, result = read(self.model, window, cache_of([kept for kept, _ in rows]))
            yield name, size, size + full_bytes(self.model, SCORED), result
        self.model.set_attn_implementation("sdpa")
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None


def masked_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Without the keys that a press has named, head by head. kvpress puts keys in their place that no query sees, one token a step."""
    heads, tokens, length = key.shape[1], query.shape[2], key.shape[2]
    seen = torch.ones(heads, tokens, length, dtype=torch.bool).tril(length - tokens)
    _, masked_heads, masked_keys = module.masked_key_indices
    seen[masked_heads, :, masked_keys] = False
    group = query.shape[1] // heads
    key, value, seen = (x.repeat_interleave(group, d) for x, d in ((key, 1), (value, 1), (seen, 0)))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen[None], scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class Quantized:
    """transformers' QuantizedCache, scales counted as fp16."""

    def __init__(self, model, bits):
        self.model, self.bits = model, bits

    def bytes(self, cache):
        size = 0
        for layer in cache.layers:
            size += 2 * (layer.keys.numel() + layer.values.numel())
            for packed in (layer._quantized_keys, layer._quantized_values):
                size += packed._data._data.nbytes + 2 * (packed._scale.numel() + packed._shift.numel())
        return size

    def run(self, window):
        yield "full", 0, 0, read(self.model, window, prefill(self.model, window, DynamicCache()))[1]
        for bits in self.bits:
            cache = transformers.QuantizedCache("quanto", self.model.config, nbits=bits)
            prefill(self.model, window, cache)
            before, result = read(self.model, window, cache, self.bytes)
            yield f"QuantizedCache, quanto {bits} bits", before, self.bytes(cache), result


class Plans:
    def __init__(self, model, plans, kernel, exact):
        import kvmix
        from kvmix.transformers import KVmixCache, use_kvmix

        self.model = use_kvmix(model)
        self.plans = plans

        class AsGguf(KVmixCache):
            """Takes plans that were made of the GGUF file, whose heads' channels are pairs of neighbours."""

            def attend(self, layer, query, key, value, mask):
                query, key = (x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in (query, key))
                return super().attend(layer, query, key, value, mask)

        self.make = lambda plan: AsGguf(kvmix.Plan.read(plan), model, force=True, kernel=kernel, exact=exact)

    @staticmethod
    def bytes(cache):
        return cache.pages.memory()["total_bytes"]

    def run(self, window):
        self.model.set_attn_implementation("sdpa")
        yield "full", 0, 0, read(self.model, window, prefill(self.model, window, DynamicCache()))[1]
        self.model.set_attn_implementation("kvmix")
        for name, plan in self.plans:
            cache = prefill(self.model, window, self.make(plan))
            cache.announce(SCORED, decoded=True)
            before, result = read(self.model, window, cache, self.bytes)
            yield name, before, self.bytes(cache), result


def report(files):
    rows = [row for file in files for row in json.loads(pathlib.Path(file).read_text())]
    print("| window | cache | size, prompt's end | size, window's end | mean KL | top-1 |")
    print("|---|---|---|---|---|---|")
    for context in sorted({row["context"] for row in rows}):
        found = {}
        for row in rows:
            if row["context"] == context:
                found.setdefault((row["name"], round(row["size"], 2)), []).append(row)
        shared = set.intersection(*({row["first"] for row in all} for all in found.values()))  # windows that all have read
        found = {key: [row for row in all if row["first"] in shared] for key, all in found.items()}
        for (name, _), all in sorted(found.items(), key=lambda item: (-item[0][1], statistics.mean(r["kl"] for r in item[1]))):
            size, later, kl, top1 = ([row[key] for row in all] for key in ("size", "size_later", "kl", "top1"))
            error = statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
            print(
                f"| {context} x {len(all)} | {name} | {statistics.mean(size):.3f} | {statistics.mean(later):.3f} "
                f"| {statistics.mean(kl):.4f} ± {error:.4f} | {100 * statistics.mean(top1):.1f} % |"
            )


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", nargs="?", type=pathlib.Path, help="a GGUF file")
    arguments.add_argument("text", nargs="?", type=pathlib.Path)
    arguments.add_argument("--report", nargs="+", help="the table of files that --out wrote")
    arguments.add_argument("--presses", action="store_true")
    arguments.add_argument("--parts", type=float, nargs="+", default=[0.25, 0.125], help="of the prompt that presses keep (1/4, 1/8)")
    arguments.add_argument("--quantized", type=int, nargs="+", default=[], help="bits")
    arguments.add_argument("--plan", action="append", default=[], help="NAME=FILE, of the GGUF file")
    arguments.add_argument("--kernel", default="")
    arguments.add_argument("--exact", action="store_true", help="plans without int8 products")
    arguments.add_argument("--context", type=int, default=2048, help="tokens of a window (2048)")
    arguments.add_argument("--windows", type=int, default=6)
    arguments.add_argument("--skip", type=int, default=8192, help="tokens of the text (8192)")
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--out", type=pathlib.Path)
    given = arguments.parse_args()
    if given.report:
        return report(given.report)
    if given.threads:
        torch.set_num_threads(given.threads)
    model, tokenizer = load(given.model)
    tokens = torch.tensor(tokenizer(given.text.read_text(), add_special_tokens=False)["input_ids"])
    subjects = []
    if given.presses:
        subjects.append(Presses(model, tokenizer, given.parts))
    if given.quantized:
        subjects.append(Quantized(model, given.quantized))
    if given.plan:
        subjects.append(Plans(model, [plan.split("=", 1) for plan in given.plan], given.kernel, given.exact))
    rows = []
    for index in range(given.windows):
        first = given.skip + index * given.context
        window = tokens[first : first + given.context][None]
        for subject in subjects:
            results = subject.run(window)
            _, _, _, want = next(results)
            full = full_bytes(model, given.context - SCORED), full_bytes(model, given.context)
            for name, size, later, got in results:
                kl = (want.exp() * (want - got)).sum(-1).mean()
                top1 = (want.argmax(-1) == got.argmax(-1)).float().mean()
                row = {"context": given.context, "first": first, "name": name, "size": size / full[0], "size_later": later / full[1]}
                rows.append(row | {"kl": float(kl), "top1": float(top1)})
                print(rows[-1], flush=True)
            if given.out:
                given.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
