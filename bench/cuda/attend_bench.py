#!/usr/bin/env python3
"""Decode attention on packed pages against fp16 on the same GPU: python attend_bench.py LIBKVMIX.so [--repeat N]

Every timing is a CUDA-event median over launches that walk through enough copies of the data to leave the L2 cache cold.
fp16 is the fastest of PyTorch's scaled-dot-product attention backends (cuDNN, flash, and for grouped heads also flash with
the group folded into the query axis). Needs PyTorch with CUDA; libkvmix built with -DKVMIX_CUDA=ON -DBUILD_SHARED_LIBS=ON.
"""
import argparse
import ctypes as c
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE, DIM, TRELLIS = 128, 128, 32
flush_reads = False


class Format(c.Structure):
    _fields_ = [(n, c.c_int32) for n in ("head_dim", "key_bits", "value_bits", "key_group", "value_group", "key_per_token")]


class Item(c.Structure):
    _fields_ = [("v", c.c_int32 * 12)]


class Params(c.Structure):
    _fields_ = [("format", Format)] + [
        (n, c.c_int32) for n in ("sequences", "q_heads", "kv_heads", "q_tokens", "sinks", "sliding_window")
    ] + [("scale", c.c_float), ("softcap", c.c_float)] + [
        ("q", c.c_void_p), ("out", c.c_void_p), ("lse", c.c_void_p),
        ("records", c.c_void_p), ("record_page_stride", c.c_int64), ("record_head_stride", c.c_int64),
        ("open_pages", c.c_void_p), ("open_page_stride", c.c_int64), ("open_head_stride", c.c_int64),
        ("page_table", c.c_void_p), ("page_table_stride", c.c_int64),
        ("items", c.c_void_p), ("item_count", c.c_int32), ("workspace", c.c_void_p), ("workspace_bytes", c.c_size_t),
        ("stream", c.c_void_p), ("bf16", c.c_int32), ("new_keys", c.c_void_p), ("new_values", c.c_void_p),
        ("new_sequence_stride", c.c_int64), ("new_token_stride", c.c_int64), ("new_head_stride", c.c_int64)]


class Transform(c.Structure):
    _fields_ = [("center", c.c_void_p), ("scales", c.c_void_p), ("feedback", c.c_void_p), ("hadamard", c.c_int32)]


class Seal(c.Structure):
    _fields_ = [("format", Format), ("pages", c.c_int32), ("kv_heads", c.c_int32), ("fitted", c.c_int32),
                ("open_pages", c.c_void_p), ("open_page_stride", c.c_int64), ("open_head_stride", c.c_int64),
                ("records", c.c_void_p), ("record_page_stride", c.c_int64), ("record_head_stride", c.c_int64),
                ("open_ids", c.c_void_p), ("record_ids", c.c_void_p), ("stream", c.c_void_p),
                ("key_transform", Transform), ("value_transform", Transform)]


class Append(c.Structure):
    _fields_ = [("rows", c.c_int32), ("kv_heads", c.c_int32), ("head_dim", c.c_int32), ("bf16", c.c_int32),
                ("keys", c.c_void_p), ("values", c.c_void_p), ("row_stride", c.c_int64), ("head_stride", c.c_int64),
                ("open_pages", c.c_void_p), ("open_page_stride", c.c_int64), ("open_head_stride", c.c_int64),
                ("slots", c.c_void_p), ("stream", c.c_void_p)]


def named(width):
    return f"t{width - TRELLIS}" if width > TRELLIS else str(width)


def timed(launches, repeat):
    """Median milliseconds of a launch; `launches` walk over different copies of the data."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    time.sleep(0.15)  # the driver may still be clearing memory that was just given back
    times = []
    for i in range(repeat):
        flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launches[i % len(launches)]()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def flush():
    if flush_reads:
        torch.sum(scratch.view(torch.int64))
    else:
        scratch.add_(1)
    # Keeps the GPU busy while the timed launch is queued, so that launch latency of the host stays outside.
    torch.cuda._sleep(200000)


def fp16(batch, q_heads, kv_heads, length, repeat, dim=DIM):
    q = torch.randn(batch, q_heads, 1, dim, dtype=torch.float16, device="cuda")
    k = torch.randn(batch, kv_heads, length, dim, dtype=torch.float16, device="cuda")
    v = torch.randn_like(k)
    folded = q.view(batch, kv_heads, q_heads // kv_heads, dim)
    results = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for fold in (False, True):
            if fold and q_heads == kv_heads:
                continue
            def call():
                with sdpa_kernel(backend):
                    if fold:
                        return torch.nn.functional.scaled_dot_product_attention(folded, k, v)
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q_heads != kv_heads)
            try:
                results[name + ("-folded" if fold else "")] = timed([call], repeat)
            except RuntimeError:
                pass  # this backend does not take the shape
    best = min(results, key=results.get)
    return best, results[best]


class Packed:
    """A packed cache of random records, all pages of one format, and a launch of attention over it. With open_page the last page
    of every sequence is open and half full, and store_new() makes launches store the newest token's row there first. With rows
    all pages are open, of fp16 rows."""

    def __init__(self, lib, bits, batch, q_heads, kv_heads, length, groups=(128, 128), dim=DIM, q_tokens=1, open_page=False,
                 rows=False):
        self.lib = lib
        p = self.p = Params(format=Format(dim, bits[0], bits[1], *groups, 0), sequences=batch, q_heads=q_heads,
                            kv_heads=kv_heads, q_tokens=q_tokens)
        size = c.c_size_t()
        check(lib, lib.kvmix_cuda_record_bytes(c.byref(p.format), c.byref(size)))
        record, pages = (size.value + 127) // 128 * 128, length // PAGE  # records at multiples of 128 bytes
        # Random codes, scales and midpoints of fp16 bytes 0x2020..0x2c2c (positive, about 0.01), exponents 0.
        self.pool = torch.randint(0x20, 0x2D, (1 if rows else batch * pages * kv_heads, record), dtype=torch.uint8, device="cuda")
        self.pool[:, :16] = 0
        self.bytes, self.memory = self.pool.shape[0] * size.value, self.pool.numel()
        self.table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages).contiguous()
        if open_page:
            length -= PAGE // 2
            self.table[:, -1] = -1 - torch.arange(batch, device="cuda", dtype=torch.int32)
            self.open = torch.randn(batch, kv_heads, 2, PAGE, dim, dtype=torch.float16, device="cuda")
            p.open_pages, p.open_head_stride = self.open.data_ptr(), 2 * PAGE * dim * 2
            p.open_page_stride = p.open_head_stride * kv_heads
            self.rows = torch.randn(2, batch, q_tokens, kv_heads, dim, dtype=torch.float16, device="cuda")
        if rows:
            self.table = -1 - self.table
            self.open = torch.randn(batch * pages, kv_heads, 2, PAGE, dim, dtype=torch.float16, device="cuda")
            p.open_pages, p.open_head_stride = self.open.data_ptr(), 2 * PAGE * dim * 2
            p.open_page_stride = p.open_head_stride * kv_heads
            self.bytes = self.memory = 2 * self.open.numel()
        self.q = torch.randn(batch, q_tokens, q_heads, dim, dtype=torch.float16, device="cuda")
        self.out = torch.empty_like(self.q)
        lengths = (c.c_int32 * batch)(*[length] * batch)
        count, space = c.c_int32(), c.c_size_t()
        check(lib, lib.kvmix_cuda_cut(c.byref(p), lengths, 0, None, 0, c.byref(count), c.byref(space)))
        host = (Item * count.value)()
        check(lib, lib.kvmix_cuda_cut(c.byref(p), lengths, 0, c.byref(host), count.value, c.byref(count), c.byref(space)))
        self.items = torch.frombuffer(bytearray(bytes(host)), dtype=torch.uint8).cuda()
        self.work = torch.zeros(space.value, dtype=torch.uint8, device="cuda")
        p.q, p.out, p.records, p.page_table = (t.data_ptr() for t in (self.q, self.out, self.pool, self.table))
        p.record_head_stride, p.record_page_stride, p.page_table_stride = record, record * kv_heads, pages
        p.items, p.item_count = self.items.data_ptr(), count.value
        p.workspace, p.workspace_bytes = self.work.data_ptr(), space.value
        p.stream = torch.cuda.current_stream().cuda_stream
        self.kernel = lib.kvmix_cuda_attend_kernel(c.byref(p)).decode()

    def store_new(self):
        self.p.new_keys, self.p.new_values = self.rows[0].data_ptr(), self.rows[1].data_ptr()
        self.p.new_head_stride = self.rows.shape[-1] * 2
        self.p.new_token_stride = self.p.new_head_stride * self.p.kv_heads
        self.p.new_sequence_stride = self.p.new_token_stride * self.p.q_tokens

    def launch(self):
        check(self.lib, self.lib.kvmix_cuda_attend(c.byref(self.p)))


def packed(lib, bits, batch, q_heads, kv_heads, length, repeat, groups=(128, 128), dim=DIM):
    cache = Packed(lib, bits, batch, q_heads, kv_heads, length, groups, dim)
    time = timed([cache.launch], repeat)
    assert torch.isfinite(cache.out).all()
    return time, cache.bytes, cache.p.item_count, cache.kernel


class Sealing:
    """Open pages of random rows, and launches that seal them and that append to them."""

    def __init__(self, lib, bits, pages, kv_heads, fitted, groups=(128, 128), dim=DIM, hadamard=False, feedback=False):
        self.lib = lib
        size, form = c.c_size_t(), Format(dim, bits[0], bits[1], *groups, 0)
        check(lib, lib.kvmix_cuda_record_bytes(c.byref(form), c.byref(size)))
        self.open = torch.randn(pages, kv_heads, 2, PAGE, dim, dtype=torch.float16, device="cuda")
        self.records = torch.empty(pages * kv_heads * size.value, dtype=torch.uint8, device="cuda")
        self.ids = torch.randperm(pages, device="cuda").to(torch.int32)
        self.bytes = self.open.numel() * 2 + self.records.numel()
        stream, head = torch.cuda.current_stream().cuda_stream, 2 * PAGE * dim * 2
        self.p = Seal(form, pages, kv_heads, int(fitted), self.open.data_ptr(), head * kv_heads, head, self.records.data_ptr(),
                      size.value * kv_heads, size.value, self.ids.data_ptr(), self.ids.data_ptr(), stream)
        self.weights = 0.02 * torch.randn(kv_heads, dim * (dim - 1) // 2, device="cuda")
        for t in (self.p.key_transform, self.p.value_transform):
            t.hadamard, t.feedback = int(hadamard), self.weights.data_ptr() if feedback else None
        self.rows = torch.randn(2, pages, kv_heads, dim, dtype=torch.float16, device="cuda")
        self.slots = torch.arange(pages, device="cuda") * PAGE + 5
        row = kv_heads * dim * 2
        self.a = Append(pages, kv_heads, dim, 0, self.rows[0].data_ptr(), self.rows[1].data_ptr(), row, dim * 2,
                        self.open.data_ptr(), head * kv_heads, head, self.slots.data_ptr(), stream)

    def seal(self):
        check(self.lib, self.lib.kvmix_cuda_seal(c.byref(self.p)))

    def append(self):
        check(self.lib, self.lib.kvmix_cuda_append(c.byref(self.a)))


def check(lib, status):
    if status != 0:
        raise RuntimeError(lib.kvmix_cuda_last_error().decode())


SHAPES = ((16, 32, 32, 8192), (32, 32, 32, 8192), (1, 32, 32, 131072), (64, 32, 8, 8192), (16, 32, 8, 8192),
          (1, 32, 8, 131072), (256, 32, 8, 1024), (8, 32, 8, 4096), (1, 32, 8, 4096))


def load(path):
    global scratch
    lib = c.CDLL(path)
    lib.kvmix_cuda_last_error.restype = lib.kvmix_cuda_attend_kernel.restype = c.c_char_p
    scratch = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    return lib


def copy_rate(repeat):
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    return 2 * big.numel() / timed([lambda: other.copy_(big)], repeat) / 1e9


def attend_table(lib, copy, formats, repeat):
    print("| shape (batch, q heads, KV heads, tokens) | head_dim | bits K/V | group | fp16 ms | packed ms | ratio | of copy bandwidth |"
          " kernel |")
    print("|---|--:|---|--:|--:|--:|--:|--:|---|")
    cases = [(shape, DIM, [(bits, 128) for bits in formats] + ([((2, 2), 32), ((3, 4), 32), ((4, 3), 128)] if shape[0] == 16 else []))
             for shape in SHAPES]
    for dim, shapes in ((64, ((16, 32, 32, 8192), (64, 32, 8, 8192))), (256, ((16, 32, 8, 8192), (32, 8, 4, 8192)))):
        cases += [(shape, dim, [(bits, 128) for bits in ((2, 2), (3, 4), (4, 4))]) for shape in shapes]
    for shape, dim, cells in cases:
        base = fp16(*shape, repeat, dim)[1]
        torch.cuda.empty_cache()
        for bits, group in cells:
            ms, size, _, kernel = packed(lib, bits, *shape, repeat, (group, group), dim)
            torch.cuda.empty_cache()
            print(f"| {shape} | {dim} | {bits[0]}/{bits[1]} | {group} | {base:.4f} | {ms:.4f} | {base / ms:.2f} | "
                  f"{size / ms / 1e9 / copy:.0%} | {kernel} |", flush=True)


def formats_table(lib, copy, repeat):
    """Every pair of widths, and the groups that plans emit, at one large shape for each head_dim; ratios beside what the bytes
    allow against 2/2 in groups of 128 at the same shape."""
    print("| shape (batch, q heads, KV heads, tokens) | head_dim | bits K/V | groups K/V | fp16 ms | packed ms | ratio | of copy bandwidth |"
          " of what the bytes allow | kernel |")
    print("|---|--:|---|---|--:|--:|--:|--:|--:|---|")
    widths = (1, 2, 3, 4, 8)
    pairs = [(k, v) for k in widths for v in widths]
    few = [(2, 2), (2, 1), (3, 2), (3, 3), (4, 4), (8, 8)]
    for shape, dim, formats in (((64, 32, 8, 8192), 128, pairs), ((64, 32, 8, 8192), 96, few), ((64, 56, 8, 8192), 64, few), ((64, 14, 2, 8192), 64, few),
                                ((64, 32, 8, 8192), 64, few), ((32, 8, 4, 8192), 256, few), ((32, 64, 4, 8192), 128, few)):
        base = fp16(*shape, repeat, dim)[1]
        torch.cuda.empty_cache()
        cells = [((2, 2), (128, 128))] + [(bits, (128, 64)) for bits in formats]
        cells += [((2, 2), (64, 64)), ((2, 2), (32, 64)), ((3, 3), (32, 128)), ((2, 2), (32, 32)), ((16, 4), (128, 64))]
        first = None
        for bits, groups in cells:
            ms, size, _, kernel = packed(lib, bits, *shape, repeat, groups, dim)
            torch.cuda.empty_cache()
            first = first or (ms, size)
            print(f"| {shape} | {dim} | {bits[0]}/{bits[1]} | {groups[0]}/{groups[1]} | {base:.4f} | {ms:.4f} | {base / ms:.2f} | "
                  f"{size / ms / 1e9 / copy:.0%} | {first[0] / ms * size / first[1]:.2f} | {kernel} |", flush=True)


def trellis_table(lib, copy, repeat):
    """Trellis codes (t) beside even ones in groups of 64 of the same widths."""
    print("| shape (batch, q heads, KV heads, tokens) | head_dim | bits K/V | fp16 ms | even ms | ratio | trellis ms | ratio |"
          " of copy bandwidth | kernel |")
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|---|")
    for shape, dim in (((64, 32, 8, 8192), 128), ((16, 32, 32, 8192), 128), ((256, 32, 8, 1024), 128), ((1, 32, 8, 32768), 128),
                       ((1, 32, 8, 512), 128), ((64, 32, 8, 8192), 96), ((64, 56, 8, 8192), 64), ((64, 32, 8, 8192), 64),
                       ((32, 8, 4, 8192), 256), ((32, 64, 4, 8192), 128)):
        base = fp16(*shape, repeat, dim)[1]
        torch.cuda.empty_cache()
        for bits in ((2, 2), (3, 2), (3, 3), (4, 4), (5, 5), (8, 4)):
            codes = tuple(b + TRELLIS if b < 8 else b for b in bits)
            even = packed(lib, tuple(8 if b == 5 else b for b in bits), *shape, repeat, (128, 64), dim)[0]
            ms, size, _, kernel = packed(lib, codes, *shape, repeat, (128, 128), dim)
            torch.cuda.empty_cache()
            print(f"| {shape} | {dim} | {named(codes[0])}/{named(codes[1])} | {base:.4f} | {even:.4f} | {base / even:.2f} | {ms:.4f} |"
                  f" {base / ms:.2f} | {size / ms / 1e9 / copy:.0%} | {kernel} |", flush=True)


def fp16_table(lib, copy, repeat):
    """Pages of fp16 on both sides: rows as a cache leaves them, and records."""
    print("| shape (batch, q heads, KV heads, tokens) | head_dim | fp16 ms | pages | ms | ratio | of copy bandwidth | kernel |")
    print("|---|--:|--:|---|--:|--:|--:|---|")
    for shape, dim in (((64, 32, 8, 8192), 128), ((16, 32, 32, 8192), 128), ((256, 32, 8, 1024), 128), ((1, 32, 32, 32768), 128),
                       ((1, 32, 8, 32768), 128), ((1, 32, 32, 8192), 128), ((1, 32, 8, 8192), 128), ((1, 32, 8, 512), 128),
                       ((64, 32, 8, 8192), 96), ((64, 32, 8, 8192), 64), ((64, 56, 8, 8192), 64), ((32, 8, 4, 8192), 256),
                       ((32, 64, 4, 8192), 128)):
        base = fp16(*shape, repeat, dim)[1]
        torch.cuda.empty_cache()
        for rows in (True, False):
            cache = Packed(lib, (16, 16), *shape, dim=dim, rows=rows)
            ms = timed([cache.launch], repeat)
            assert torch.isfinite(cache.out).all()
            print(f"| {shape} | {dim} | {base:.4f} | {'rows' if rows else 'records'} | {ms:.4f} | {base / ms:.2f} | "
                  f"{cache.bytes / ms / 1e9 / copy:.0%} | {cache.kernel} |", flush=True)
            del cache
            torch.cuda.empty_cache()


def seal_table(lib, copy, repeat):
    print("| seal, 1024 pages x 32 heads | group | scales | ms | of copy bandwidth |")
    print("|---|--:|---|--:|--:|")
    for bits, group in (((2, 2), 128), ((3, 4), 128), ((4, 4), 128), ((2, 2), 32)):
        ways = [("min-max", {}), ("fitted", {"fitted": True})]
        if bits == (2, 2) and group == 128:
            ways += [("fitted, Hadamard", {"fitted": True, "hadamard": True}),
                     ("fitted, Hadamard, feedback", {"fitted": True, "hadamard": True, "feedback": True})]
        for name, way in ways:
            work = Sealing(lib, bits, 1024, 32, way.pop("fitted", False), (group, group), **way)
            ms = timed([work.seal], repeat)
            print(f"| {bits[0]}/{bits[1]} | {group} | {name} | {ms:.4f} | {work.bytes / ms / 1e9 / copy:.0%} |", flush=True)
            del work
            torch.cuda.empty_cache()
    for bits in (2, 3, 4, 5):
        for name, way in (("trellis", {}), ("trellis, Hadamard, feedback", {"hadamard": True, "feedback": True})):
            work = Sealing(lib, (bits + TRELLIS, bits + TRELLIS), 1024, 32, False, **way)
            ms = timed([work.seal], repeat)
            print(f"| t{bits}/t{bits} | 128 | {name} | {ms:.4f} | {work.bytes / ms / 1e9 / copy:.0%} |", flush=True)
            del work
            torch.cuda.empty_cache()


def prefill_table(lib, repeat):
    """A whole prompt over its own packed pages, against causal fp16 attention."""
    print("| prefill (batch, q heads, KV heads, tokens) | head_dim | bits K/V | fp16 ms | packed ms | ratio | kernel |")
    print("|---|--:|---|--:|--:|--:|---|")
    for batch, q_heads, kv_heads, length, dim in ((1, 32, 32, 4096, DIM), (1, 32, 8, 4096, DIM), (1, 32, 8, 16384, DIM),
                                                  (1, 32, 8, 8192, 64), (1, 16, 4, 8192, 256)):
        q = torch.randn(batch, q_heads, length, dim, dtype=torch.float16, device="cuda")
        k = torch.randn(batch, kv_heads, length, dim, dtype=torch.float16, device="cuda")
        times = []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            def call():
                with sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=q_heads != kv_heads)
            try:
                times.append(timed([call], repeat))
            except RuntimeError:
                pass  # this backend does not take the shape
        for bits in ((2, 2), (4, 4), (TRELLIS + 2, TRELLIS + 2), (TRELLIS + 4, TRELLIS + 4)):
            cache = Packed(lib, bits, batch, q_heads, kv_heads, length, dim=dim, q_tokens=length)
            ms = timed([cache.launch], repeat)
            print(f"| {(batch, q_heads, kv_heads, length)} | {dim} | {named(bits[0])}/{named(bits[1])} | {min(times):.4f} | {ms:.4f} | "
                  f"{min(times) / ms:.2f} | {cache.kernel} |", flush=True)


def chunk_table(lib, repeat):
    """Chunks of a prompt over a long cache: time a row and seen token, against chunks of 2,048 tokens."""
    print("| chunk over (batch, q heads, KV heads, tokens) | head_dim | tokens | query rows | pieces | ms | against long | kernel |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for batch, q_heads, kv_heads, length, dim in ((1, 32, 8, 8192, DIM), (1, 32, 8, 32768, DIM), (8, 32, 8, 8192, DIM),
                                                  (1, 32, 32, 8192, DIM), (1, 14, 2, 8192, 64), (1, 8, 4, 8192, 256)):
        group, long = q_heads // kv_heads, 0
        for tokens in (2048, *(-(-rows // group) for rows in (65, 96, 128, 192, 256, 384, 511))):
            cache = Packed(lib, (2, 2), batch, q_heads, kv_heads, length, (128, 64), dim, tokens)
            ms = timed([cache.launch], repeat)
            each = ms / (tokens * (length - (tokens - 1) / 2))
            long = long or each
            print(f"| {(batch, q_heads, kv_heads, length)} | {dim} | {tokens} | {tokens * group} | {cache.p.item_count} | {ms:.4f} | "
                  f"{each / long:.2f} | {cache.kernel} |", flush=True)
            del cache


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--formats", default="2/2,2/1,3/3,4/4")
    parser.add_argument("--tables", default="attend,formats,trellis,fp16,seal,prefill,chunks")
    parser.add_argument("--flush", choices=("write", "read"), default="write",
                        help="what fills the L2 before a launch: written lines, which launches then push out, or read ones")
    args = parser.parse_args()
    global flush_reads
    flush_reads = args.flush == "read"
    lib = load(args.library)
    copy = copy_rate(args.repeat)
    print(f"GPU {torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.2f} TB/s")
    tables = args.tables.split(",")
    if "attend" in tables:
        attend_table(lib, copy, [tuple(map(int, f.split("/"))) for f in args.formats.split(",")], args.repeat)
    if "formats" in tables:
        formats_table(lib, copy, args.repeat)
    if "trellis" in tables:
        trellis_table(lib, copy, args.repeat)
    if "fp16" in tables:
        fp16_table(lib, copy, args.repeat)
    if "seal" in tables:
        seal_table(lib, copy, args.repeat)
    if "prefill" in tables:
        prefill_table(lib, args.repeat)
    if "chunks" in tables:
        chunk_table(lib, args.repeat)


if __name__ == "__main__":
    main()
