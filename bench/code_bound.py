#!/usr/bin/env python3
"""How few bits codes of rows can take: the Shannon bound of a model's cache, and what stands between it and codes like ours.

    bench/code_bound.py MODEL.gguf TEXT

Wants torch, transformers, gguf and accelerate, and a model whose layers all attend to everything (llama, qwen2). Weights are the file's in
fp32, attention is exact. Sinks (16 rows) stay as they are; the rest of a page of 128 tokens is coded once 64 newer tokens stand behind it;
newer rows are exact but where a row of the table says otherwise. The first --context tokens of TEXT are measured, their second half scored;
what codes are made from comes from four windows of 2,048 further on. Bits are of sealed rows alone, with all that a code stores beside them.

bound    Each head's rows are replaced by what the best code of Gaussian rows of so many bits would give back: the test channel of
         reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3) in the eigenbasis of C weighted by M,
         one water level over all layers, heads and sides. C is the rows' covariance, M the Fisher information of the rows' errors
         (gradients of sampled labels), drawn to its mean by --shrink, as few samples say little of directions. "turned mean": keys
         less the mean that they have before RoPE, turned to their position; C is of what is left.
length   Bits that a Gaussian code of the same error takes less by what it knows. "before RoPE": C is that of keys taken back to position 0.
codes    Codes that store so many bits: widths by head (or layer and side) where Fisher information says they pay, feedback over
         channels (LDLQ). "group scales": uniform codes, scale and zero of 16 bits per channel and 128 tokens (keys, fitted) or per token
         (values, from least to most), as kvmix'. "token scales": 8 bits for a row's norm, best scalar levels of a Gaussian (Lloyd-Max).
         "trellis": instead of levels a trellis of 4 states along a page's tokens (Marcellin and Fischer, 1990).
         "whitened": a dense map per head instead of a scale per channel and a Hadamard rotation.
"""

import argparse
import math
import pathlib

import torch
import transformers

SINKS, WINDOW, PAGE = 16, 64, 128
CALIBRATION, LENGTH = (20, 45, 70, 95), 2048  # windows of the text


def scored(window):
    """Positions of the second half, whose next tokens are known."""
    return slice(window.shape[1] // 2, window.shape[1] - 1)


def load(path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="coded"
    ).eval()
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        raise SystemExit(f"{path.name}: layers with a sliding window are not measured here; give a llama or qwen2 model")
    return model.requires_grad_(False), tokenizer


class Coded:
    """Attention over rows that a running cache would give back. `sealed`, `newer`: (layer, keys, values) to what is read of them,
    [1, heads, tokens, width]; `sinks`: whether the first rows are exact and pages begin behind them."""

    sealed = newer = log = None
    sinks = True

    @torch.no_grad()
    def rows(self, model, window):
        """Of each layer: keys and values, [heads, tokens, width]."""
        self.log, self.sealed, self.newer = (log := []), None, None
        model.model(window, use_cache=False)
        self.log = None
        return log

    def __call__(self, module, query, key, value, mask, scaling, **_):
        tokens, per = query.shape[2], query.shape[1] // key.shape[1]
        if self.log is not None:
            self.log.append((key[0], value[0]))
        coded = self.sealed(module.layer_idx, key, value) if self.sealed else (key, value)
        newer = self.newer(module.layer_idx, key, value) if self.newer else (key, value)
        out, first = [], 0
        while first < tokens:  # queries that see the same pages sealed
            page = max(0, (first + 1 - SINKS - WINDOW) // PAGE)
            end, sealed = min(tokens, SINKS + WINDOW + PAGE * (page + 1) - 1), SINKS + PAGE * page
            sinks = min(SINKS if self.sinks else 0, end)
            seen = [
                torch.cat([x[:, :, :sinks], c[:, :, sinks:sealed], n[:, :, max(sinks, sealed) : end]], 2).repeat_interleave(per, 1)
                for x, c, n in zip((key, value), coded, newer)
            ]
            later = torch.arange(seen[0].shape[2])[None] > torch.arange(first, end)[:, None]
            scores = (query[:, :, first:end] @ seen[0].transpose(2, 3) * scaling).masked_fill(later, -1e30)
            out.append(scores.softmax(-1) @ seen[1])
            first = end
        return torch.cat(out, 2).transpose(1, 2).contiguous(), None


class Measure:
    """KL of the measured window's second half against exact rows."""

    def __init__(self, model, coded, window):
        self.model, self.coded, self.window = model, coded, window
        self.reference = self.log_probabilities()
        nll = -self.reference.gather(1, window[0, window.shape[1] // 2 + 1 :, None]).mean()
        print(f"{window.shape[1]} tokens, perplexity {nll.exp():.3f}\n")
        print("| rows | bits | predicted | KL | standard error | top-1 |\n|---|--:|--:|--:|--:|--:|")

    @torch.no_grad()
    def log_probabilities(self):
        hidden = self.model.model(self.window, use_cache=False).last_hidden_state[0, scored(self.window)]
        return self.model.lm_head(hidden).log_softmax(-1)

    def row(self, name, bits=0, predicted=0, sealed=None, newer=None, sinks=True):
        self.coded.sealed, self.coded.newer, self.coded.sinks = sealed, newer, sinks
        read, exact = self.log_probabilities(), self.reference
        kl = (exact.exp() * (exact - read)).sum(-1)
        top = (exact.argmax(-1) == read.argmax(-1)).float().mean()
        bits, predicted = (f"{x:.{d}f}" if x else "" for x, d in ((bits, 2), (predicted, 6)))
        print(f"| {name} | {bits} | {predicted} | {kl.mean():.6f} | {kl.std() / len(kl) ** 0.5:.6f} | {100 * top:.1f} % |", flush=True)


def turn(x, theta, sign=1):
    """RoPE of rows [..., tokens, width] (sign -1: taken back), halves as transformers has them."""
    half = x.shape[-1] // 2
    angle = sign * torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Statistics:
    """Rows of the calibration windows, [window][layer] of (keys, values), [heads, tokens, width], and the Fisher information of errors
    of sealed rows, [layer, side, head, width, width], so that tr(M E) / 2 is the KL per scored token of errors with covariance E."""

    def __init__(self, model, coded, windows, samples, shrink):
        config = model.config
        self.theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta
        self.shrink = shrink
        self.rows = [coded.rows(model, window) for window in windows]
        heads, _, width = self.rows[0][0][0].shape
        self.layers, self.heads, self.width = config.num_hidden_layers, heads, width
        self.fisher = torch.zeros(self.layers, 2, heads, width, width)
        draw = torch.Generator().manual_seed(1)
        for window in [w for w in windows for _ in range(samples)]:
            self.sample(model, coded, window, draw, len(windows) * samples)
        self.means = [torch.cat([turn(w[n][0], self.theta, -1)[:, SINKS:] for w in self.rows], 1).mean(1, keepdim=True)
                      for n in range(self.layers)]  # fmt: skip

    def sample(self, model, coded, window, draw, parts):
        errors = {}

        def sealed(layer, key, value):
            errors[layer] = torch.zeros_like(key).requires_grad_(), torch.zeros_like(value).requires_grad_()
            return key + errors[layer][0], value + errors[layer][1]

        coded.sealed = sealed
        hidden = model.model(window, use_cache=False).last_hidden_state[0, scored(window)]
        top = hidden.detach().requires_grad_()
        log = model.lm_head(top).log_softmax(-1)
        log.gather(1, torch.multinomial(log.detach().exp(), 1, generator=draw)).sum().backward()
        hidden.backward(top.grad)
        coded.sealed = None
        for layer, sides in errors.items():
            for side, error in enumerate(sides):
                g = error.grad[0]
                self.fisher[layer, side] += g.transpose(1, 2) @ g / (len(hidden) * parts)

    def weight(self, unit):
        m = self.fisher[unit].double()
        return (1 - self.shrink) * m + self.shrink * m.diagonal().mean() * torch.eye(self.width)

    def turned_mean(self, layer, tokens):
        return turn(self.means[layer].expand(self.heads, tokens, self.width), self.theta)

    def view(self, layer, side, rows, view):
        """Rows [heads, tokens, width] as codes see them: "rows" as they are, "turned mean", "before RoPE"; values always as they are."""
        if side == 0 and view == "turned mean":
            return rows - self.turned_mean(layer, rows.shape[1])
        return turn(rows, self.theta, -1) if side == 0 and view == "before RoPE" else rows

    def sources(self, view):
        """Of every head: mean and covariance of its rows."""
        for layer in range(self.layers):
            for side in (0, 1):
                x = torch.cat([self.view(layer, side, w[layer][side], view)[:, SINKS:] for w in self.rows], 1)
                for head in range(self.heads):
                    mean = x[head].mean(0)
                    yield (layer, side, head), mean, torch.cov((x[head] - mean).mT).double()

    def coder(self, view, code):
        """`code` of a head's rows, (unit, rows) to rows, as the attention above wants it."""

        def sealed(layer, key, value):
            out = []
            for side, x in enumerate((key[0], value[0])):
                seen = self.view(layer, side, x, view)
                read = torch.stack([code((layer, side, head), seen[head]) for head in range(self.heads)])
                out.append((read + x - seen)[None])  # the mean back
            return out

        return sealed


def bound(statistics, measure, view, bits):
    """Rows of the test channel."""
    basis = {}
    for unit, mean, covariance in statistics.sources(view):
        m = statistics.weight(unit)
        values, vectors = torch.linalg.eigh(m)
        root, inverse = (vectors * values**p @ vectors.mT for p in (0.5, -0.5))
        energy, vectors = torch.linalg.eigh(root @ covariance @ root)
        basis[unit] = mean, (root @ vectors).float(), (vectors.mT @ inverse).float(), energy.clamp_min(1e-20)
    every = torch.cat([b[3] for b in basis.values()])
    low, high = -80.0, 20.0
    for _ in range(80):
        level = (low + high) / 2
        low, high = (level, high) if (torch.log2(every) - level).clamp_min(0).mean() / 2 > bits else (low, level)
    water, draw = 2**level, torch.Generator().manual_seed(0)

    def code(unit, x):
        mean, to, back, energy = basis[unit]
        part = (water / energy).clamp_max(1).float()  # of the energy that is lost
        noise = torch.randn(x.shape, generator=draw) * (energy.float() * part * (1 - part)).sqrt()
        return ((x - mean) @ to * (1 - part) + noise) @ back + mean

    predicted = every.clamp_max(water).sum().item() / 2
    measure.row(f"bound, {view}", bits, predicted, statistics.coder(view, code))


def lengths(statistics, measured):
    """Bits a number of a Gaussian code at a fine, equal error, on the measured window, less those of rows on their own."""

    def bits(seen, test):
        mean = seen.mean(0)
        covariance = torch.cov((seen - mean).mT).double()
        root = torch.linalg.cholesky(covariance + torch.eye(len(covariance)) * covariance.diagonal().mean() * 1e-4)
        left = torch.linalg.solve_triangular(root, (test - mean).double().mT, upper=False).square().sum(0).mean()
        return ((root.diagonal().log().sum() + left / 2) / math.log(2) / len(covariance)).item()

    def rest(given, given_test, seen, test):
        """What a linear prediction leaves."""
        a, b = given - given.mean(0), seen - seen.mean(0)
        gram = a.mT @ a
        weights = torch.linalg.solve(gram + torch.eye(len(gram)) * gram.diagonal().mean() * 1e-3, a.mT @ b)
        return b - a @ weights, test - seen.mean(0) - (given_test - given.mean(0)) @ weights

    rows, beside = {}, lambda a, b: torch.cat((a, b), 1)
    for layer in range(statistics.layers):

        def of(side, view, layer=layer):
            """[heads, tokens, width] of calibration and of the measured window."""
            parts = [statistics.view(layer, side, w[layer][side], view)[:, SINKS:] for w in (*statistics.rows, measured)]
            return torch.cat(parts[:-1], 1), parts[-1]

        def add(name, side, *values):
            rows.setdefault((name, side), []).append(sum(values) / len(values))

        for side, view in ((0, "rows"), (0, "turned mean"), (0, "before RoPE"), (1, "rows")):
            add(f"a head, {view}", side, *(bits(*pair) for pair in zip(*of(side, view))))
        keys, values = ([x.transpose(0, 1).flatten(1) for x in of(*what)] for what in ((0, "before RoPE"), (1, "rows")))
        add("all heads, before RoPE", 0, bits(*keys))
        add("all heads", 1, bits(*values))
        add("all heads, given the layer's keys", 1, bits(*rest(*keys, *values)))
        if layer > 0:
            add("all heads, given the layer before", 0, bits(*rest(*before, *keys)))
            add("all heads, given the layer before and keys", 1, bits(*rest(*map(beside, before, keys), *values)))
        before = [*map(beside, keys, values)]
    mean = {name: sum(value) / len(value) for name, value in rows.items()}
    print("\n| what a code knows | side | bits a number saved |\n|---|---|--:|")
    for name, side in mean:
        print(f"| {name} | {('keys', 'values')[side]} | {mean['a head, rows', side] - mean[name, side]:.2f} |")


GRID = torch.linspace(-6.5, 6.5, 100001, dtype=torch.double)
DENSITY = (-GRID * GRID / 2).exp()


def gaussian_error(levels):
    """Mean squared error of levels for a unit Gaussian."""
    nearest = torch.bucketize(GRID, (levels[1:] + levels[:-1]).double() / 2)
    return ((DENSITY * (GRID - levels.double()[nearest]) ** 2).sum() / DENSITY.sum()).item()


def uniform(bits):
    """The best evenly spaced levels [2^bits] for a unit Gaussian, and their error."""
    tries = [(torch.arange(2**bits) - (2**bits - 1) / 2) * top / 2 ** (bits - 1) for top in torch.arange(1, 5, 0.05)]
    return min(((levels, gaussian_error(levels)) for levels in tries), key=lambda t: t[1])


def lloyd_max(bits):
    """The best levels [2^bits] for a unit Gaussian, and their error."""
    levels = (torch.special.ndtri((torch.arange(2**bits, dtype=torch.double) + 0.5) / 2**bits) * 3**0.5).clamp(-6, 6)
    for _ in range(1500):
        nearest = torch.bucketize(GRID, (levels[1:] + levels[:-1]) / 2)
        weight, total = (torch.zeros_like(levels).index_add_(0, nearest, w) for w in (DENSITY, DENSITY * GRID))
        levels = torch.where(weight > 0, total / weight.clamp_min(1e-300), levels)
    return levels.float(), gaussian_error(levels)


def viterbi(x, levels):
    """Values of the best path of x [pages, tokens] through a trellis: levels [4, 2^bits], the next state is the code's low two bits."""
    pages, tokens = x.shape
    states, codes = levels.shape
    cost, steps = torch.zeros(pages, states), []
    for t in range(tokens):
        all_costs = cost[:, :, None] + (x[:, t, None, None] - levels) ** 2
        cost, step = all_costs.reshape(pages, states, codes // states, states).flatten(1, 2).min(1)  # into each next state
        steps.append(step)
    state, path = cost.argmin(1), torch.empty(pages, tokens, dtype=torch.long)
    for t in range(tokens - 1, -1, -1):
        step = steps[t].gather(1, state[:, None])[:, 0]
        path[:, t] = step * states + state
        state = step // (codes // states)
    return path


def trellis(bits):
    """Levels [4, 2^bits] of a trellis for a unit Gaussian, by Lloyd's iteration, and its mean squared error."""
    draw, shift = torch.Generator().manual_seed(0), torch.arange(4)[:, None] * 0.618034 % 1
    levels = torch.special.ndtri(((torch.arange(2**bits) + shift) / 2**bits).clamp(1e-4, 1 - 1e-4).double()).float()
    levels = (levels * (3**0.5 if bits > 2 else 1.4)).clamp(-4.5, 4.5)
    for last in [False] * 80 + [True]:
        path = viterbi(x := torch.randn(256, PAGE, generator=draw), levels)
        if last:
            return levels, (x - levels.flatten()[path]).square().mean().item()
        weight, total = (torch.zeros(levels.numel()).index_add_(0, path.flatten(), w.flatten()) for w in (torch.ones_like(x), x))
        levels = ((total + 2 * levels.flatten()) / (weight + 2)).reshape(levels.shape)


def hadamard(width):
    h = torch.ones(1, 1, dtype=torch.double)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / width**0.5


class Head:
    """How a head's rows become numbers to code: (x - mean) `to`, all channels alike in size, and what feedback (LDLQ) needs."""

    def __init__(self, mean, covariance, weight, whiten):
        h = hadamard(len(mean))
        if whiten:
            energy, vectors = torch.linalg.eigh(covariance)
            size = energy.clamp_min(energy.max() * 1e-6).sqrt()
            to, back = vectors / size @ h, h.mT @ (vectors * size).mT
        else:
            size = covariance.diagonal().sqrt()
            to, back = h / size[:, None], h.mT * size
        lower = torch.linalg.cholesky(back @ weight @ back.mT)
        sigma = (to.mT @ covariance @ to).diagonal().sqrt()
        self.cost = (lower.diagonal() * sigma).square().log().mean().exp().item() * len(mean) / 2  # of an error of 1 a number
        self.mean, self.to, self.back, self.lower, self.sigma = mean, to.float(), back.float(), lower.float(), sigma.float()

    def code(self, x, quantise):
        """`quantise` makes, of numbers [tokens, width], a function (targets, channel) to values."""
        y = (x - self.mean) @ self.to
        pages = (len(y) - SINKS) // PAGE
        z = y[SINKS : SINKS + pages * PAGE]
        nearest, read, error = quantise(z), torch.zeros_like(z), torch.zeros_like(z)
        for j in range(z.shape[1] - 1, -1, -1):  # the errors of channels behind are known: they move this one's target
            target = z[:, j] - error[:, j + 1 :] @ self.lower[j + 1 :, j] / self.lower[j, j]
            read[:, j] = nearest(target, j)
            error[:, j] = read[:, j] - z[:, j]
        y[SINKS : SINKS + pages * PAGE] = read
        return y @ self.back + self.mean


def group_scales(side, bits):
    """Uniform codes with scales and zeros as kvmix has them."""

    def quantise(z):
        most = 2**bits - 1
        if side == 1:
            zero, top = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
            step = ((top - zero) / most).clamp_min(1e-9).half().float().expand_as(z)
            zero = zero.half().float().expand_as(z)
        else:
            pages = z.reshape(-1, PAGE, z.shape[1])
            middle, half = (pages.amax(1) + pages.amin(1))[:, None] / 2, (pages.amax(1) - pages.amin(1))[:, None] / 2
            tries = []
            for part in torch.arange(0.55, 1.01, 0.05):
                s, a = (2 * half * part / most).clamp_min(1e-9).half().float(), (middle - half * part).half().float()
                tries.append((((((pages - a) / s).round().clamp(0, most) * s + a - pages) ** 2).sum(1, keepdim=True), s, a))
            best = torch.stack([t[0] for t in tries]).argmin(0, keepdim=True)
            step, zero = (torch.stack([t[i] for t in tries]).gather(0, best)[0].expand_as(pages).reshape(z.shape) for i in (1, 2))
        return lambda t, j: ((t - zero[:, j]) / step[:, j]).round().clamp(0, most) * step[:, j] + zero[:, j]

    return quantise


def token_scales(sigma, levels):
    """Levels of a unit Gaussian times a row's norm, which is stored in 8 bits (eighths of octaves)."""

    def quantise(z):
        norm = (z / sigma).square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
        scale = 2 ** ((norm.log2() * 8).round() / 8) * sigma
        if levels.dim() == 1:
            edges = (levels[1:] + levels[:-1]) / 2
            return lambda t, j: levels[torch.bucketize(t / scale[:, j], edges)] * scale[:, j]
        return lambda t, j: levels.flatten()[viterbi((t / scale[:, j]).reshape(-1, PAGE), levels)].flatten() * scale[:, j]

    return quantise


def widths(heads, bits, errors, beside, choices, by_head):
    """Greedy: the width of every head (or layer and side) under `bits` on average with `beside` (keys, values); predicted KL."""
    groups = {}
    for unit in heads:
        groups.setdefault(unit if by_head else unit[:2], []).append(unit)
    at, left = dict.fromkeys(groups, 0), bits * len(heads) - sum(choices[0] + beside[unit[1]] for unit in heads)
    while True:
        gains = []
        for name, group in groups.items():
            if at[name] + 1 < len(choices):
                low, high = choices[at[name]], choices[at[name] + 1]
                price = (high - low) * len(group)
                if price <= left + 1e-9:
                    gains.append((sum(heads[u].cost for u in group) * (errors[low] - errors[high]) / price, name, price))
        if not gains:
            width = {unit: choices[at[name]] for name, group in groups.items() for unit in group}
            return width, bits - left / len(heads), sum(h.cost * errors[width[u]] for u, h in heads.items())
        _, name, price = max(gains)
        at[name] += 1
        left -= price


def codes(statistics, measure, bits, wanted):
    flat, scalar = {b: uniform(b) for b in range(2, 9)}, {b: lloyd_max(b) for b in range(2, 9)}
    rows = [  # name, view, whitened, levels (none: group scales), widths, by head
        ("group scales, widths by layer and side", "rows", False, None, (2, 3, 4, 6, 8), False),
        ("the same, also 5", "rows", False, None, (2, 3, 4, 5, 6, 8), False),
        ("group scales, widths by head", "rows", False, None, range(2, 9), True),
        ("the same, whitened", "rows", True, None, range(2, 9), True),
        ("token scales, uniform levels, widths by head", "rows", False, flat, range(2, 9), True),
        ("token scales, widths by head", "rows", False, scalar, range(2, 9), True),
        ("the same, turned mean", "turned mean", False, scalar, range(2, 9), True),
        ("the same, turned mean, whitened", "turned mean", True, scalar, range(2, 9), True),
    ] * ("codes" in wanted)
    if "trellis" in wanted:
        paths = {b: trellis(b) if b < 8 else scalar[b] for b in range(2, 9)}
        rows.append(("trellis, turned mean", "turned mean", False, paths, range(2, 9), True))
        rows.append(("trellis, turned mean, whitened", "turned mean", True, paths, range(2, 9), True))
    for name, view, whiten, tables, choices, by_head in rows:
        heads = {u: Head(mean, cov, statistics.weight(u), whiten) for u, mean, cov in statistics.sources(view)}
        errors = {b: t[1] for b, t in (tables or flat).items()}
        beside = (8 / statistics.width,) * 2 if tables else (32 / PAGE, 32 / statistics.width)
        width, spent, predicted = widths(heads, bits, errors, beside, tuple(choices), by_head)

        def code(unit, x, heads=heads, width=width, tables=tables):
            head, b = heads[unit], width[unit]
            return head.code(x, token_scales(head.sigma, tables[b][0]) if tables else group_scales(unit[1], b))

        measure.row(name, spent, predicted, statistics.coder(view, code))


def q8_0(_, *sides):
    """llama.cpp's: blocks of 32 channels, codes of 8 bits, one fp16 scale."""
    blocks = [x.unflatten(-1, (-1, 32)) for x in sides]
    scales = [(x.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-30) for x in blocks]
    return [((x / s).round().clamp(-127, 127) * s).flatten(-2) for x, s in zip(blocks, scales)]


def recent(statistics):
    """Recent rows of 8 bits as plans have them: scaled, rotated, one scale and midpoint a token, with feedback."""
    heads = {u: Head(mean, cov, statistics.weight(u), False) for u, mean, cov in statistics.sources("rows")}

    def code(unit, x):
        padded = torch.cat([x[:SINKS], x, x[-1:].expand(-len(x) % PAGE, -1)])  # whole pages behind the sinks
        return heads[unit].code(padded, group_scales(1, 8))[SINKS : SINKS + len(x)]

    return statistics.coder("rows", code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--bits", type=float, default=4.29, help="of codes: bits a number of sealed rows, all in")
    parser.add_argument("--bounds", type=float, nargs="+", default=[3.8, 4.29, 4.7, 5.2], help="bits of the bound's rows")
    kinds = ["q8_0", "bound", "length", "codes", "trellis"]
    parser.add_argument("--rows", action="append", choices=kinds, help="all but trellis, which takes longest")
    parser.add_argument("--samples", type=int, default=2, help="label samples per window of calibration")
    parser.add_argument("--shrink", type=float, default=0.3, help="of the Fisher information to its mean, 0 to 1")
    given = parser.parse_args()
    wanted = given.rows or kinds[:-1]

    transformers.AttentionInterface.register("coded", coded := Coded())
    model, tokenizer = load(given.model)
    tokens = tokenizer(given.text.read_text()).input_ids
    if len(tokens) < (need := (CALIBRATION[-1] + 1) * LENGTH):
        raise SystemExit(f"{given.text}: {len(tokens)} tokens, {need} are needed; give a longer text")
    if not 256 <= given.context <= CALIBRATION[0] * LENGTH:
        raise SystemExit(f"--context {given.context}: 256 to {CALIBRATION[0] * LENGTH}, where calibration begins")
    windows = [torch.tensor([tokens[n * LENGTH : (n + 1) * LENGTH]]) for n in CALIBRATION]
    statistics = Statistics(model, coded, windows, given.samples, given.shrink)
    measure = Measure(model, coded, window := torch.tensor([tokens[: given.context]]))
    if "q8_0" in wanted:
        measure.row("q8_0", 8.5, sealed=q8_0, newer=q8_0, sinks=False)
        measure.row("q8_0, recent rows alone", newer=q8_0)
        measure.row("8 bits with feedback, recent rows alone", newer=recent(statistics))
    for bits in given.bounds if "bound" in wanted else []:
        for view in ("rows", "turned mean"):
            bound(statistics, measure, view, bits)
    if "codes" in wanted or "trellis" in wanted:
        codes(statistics, measure, given.bits, wanted)
    if "length" in wanted:
        lengths(statistics, coded.rows(model, window))


if __name__ == "__main__":
    main()
