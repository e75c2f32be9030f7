#!/usr/bin/env python3
"""Decode attention on packed pages against fp16 on the same GPU: python attend_bench.py LIBKVMIX.so [--repeat N]

Every timing is a CUDA-event median over launches that walk through enough copies of the data to leave the L2 cache cold.
fp16 is the fastest of PyTorch's scaled-dot-product attention backends (cuDNN, flash, and for grouped heads also flash with
the group folded into the query axis). Needs PyTorch with CUDA; libkvmix built with -DKVMIX_CUDA=ON -DBUILD_SHARED_LIBS=ON.
"""
import argparse
import ctypes as c
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE, DIM = 128, 128


class Format(c.Structure):
    _fields_ = [(n, c.c_int32) for n in ("head_dim", "key_bits", "value_bits", "key_group", "value_group")]


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
        ("stream", c.c_void_p)]


def timed(launches, repeat):
    """Median milliseconds of a launch; `launches` walk over different copies of the data."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
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
    scratch.add_(1)
    # Keeps the GPU busy while the timed launch is queued, so that launch latency of the host stays outside.
    torch.cuda._sleep(200000)


def fp16(batch, q_heads, kv_heads, length, repeat):
    q = torch.randn(batch, q_heads, 1, DIM, dtype=torch.float16, device="cuda")
    k = torch.randn(batch, kv_heads, length, DIM, dtype=torch.float16, device="cuda")
    v = torch.randn_like(k)
    folded = q.view(batch, kv_heads, q_heads // kv_heads, DIM)
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


def packed(lib, bits, batch, q_heads, kv_heads, length, repeat, groups=(128, 128)):
    p = Params(format=Format(DIM, bits[0], bits[1], *groups), sequences=batch, q_heads=q_heads, kv_heads=kv_heads, q_tokens=1)
    size = c.c_size_t()
    check(lib, lib.kvmix_cuda_record_bytes(c.byref(p.format), c.byref(size)))
    record, pages = size.value, length // PAGE
    # Random codes, scales and midpoints of fp16 bytes 0x2020..0x2c2c (positive, about 0.01), exponents 0.
    pool = torch.randint(0x20, 0x2D, (batch * pages * kv_heads, record), dtype=torch.uint8, device="cuda")
    pool[:, :16] = 0
    table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages).contiguous()
    q = torch.randn(batch, 1, q_heads, DIM, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    lengths = (c.c_int32 * batch)(*[length] * batch)
    count, space = c.c_int32(), c.c_size_t()
    check(lib, lib.kvmix_cuda_plan(c.byref(p), lengths, 0, None, 0, c.byref(count), c.byref(space)))
    host = (Item * count.value)()
    check(lib, lib.kvmix_cuda_plan(c.byref(p), lengths, 0, c.byref(host), count.value, c.byref(count), c.byref(space)))
    items = torch.frombuffer(bytearray(bytes(host)), dtype=torch.uint8).cuda()
    work = torch.zeros(space.value, dtype=torch.uint8, device="cuda")
    p.q, p.out, p.records, p.page_table = q.data_ptr(), out.data_ptr(), pool.data_ptr(), table.data_ptr()
    p.record_head_stride, p.record_page_stride, p.page_table_stride = record, record * kv_heads, pages
    p.items, p.item_count, p.workspace, p.workspace_bytes = items.data_ptr(), count.value, work.data_ptr(), space.value
    p.stream = torch.cuda.current_stream().cuda_stream
    time = timed([lambda: check(lib, lib.kvmix_cuda_attend(c.byref(p)))], repeat)
    assert torch.isfinite(out).all()
    return time, pool.numel(), count.value


def check(lib, status):
    if status != 0:
        raise RuntimeError(lib.kvmix_cuda_last_error().decode())


def main():
    global scratch
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--formats", default="2/2,4/4")
    args = parser.parse_args()
    lib = c.CDLL(args.library)
    lib.kvmix_cuda_last_error.restype = c.c_char_p
    scratch = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    copy = 2 * big.numel() / timed([lambda: other.copy_(big)], args.repeat) / 1e9
    del big, other
    print(f"GPU {torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.2f} TB/s")
    print("| shape (batch, q heads, kv heads, tokens) | format | fp16 ms (kernel) | packed ms | ratio | TB/s | of copy | blocks |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    formats = [tuple(map(int, f.split("/"))) for f in args.formats.split(",")]
    for shape in ((16, 32, 32, 8192), (32, 32, 32, 8192), (1, 32, 32, 131072), (64, 32, 8, 8192), (16, 32, 8, 8192),
                  (1, 32, 8, 131072), (8, 32, 8, 4096), (1, 32, 8, 4096)):
        name, base = fp16(*shape, args.repeat)
        torch.cuda.empty_cache()
        for bits in formats:
            ms, size, blocks = packed(lib, bits, *shape, args.repeat)
            torch.cuda.empty_cache()
            rate = size / ms / 1e9
            print(f"| {shape} | {bits[0]}/{bits[1]} | {base:.4f} ({name}) | {ms:.4f} | {base / ms:.2f} | {rate:.2f} | "
                  f"{rate / copy:.0%} | {blocks} |", flush=True)


if __name__ == "__main__":
    main()
