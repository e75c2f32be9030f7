#!/usr/bin/env python3
"""Attention of one decode step of a whole model, packed against fp16: python model_bench.py LIBKVMIX.so [--length N]

32 layers in the paper's mixed plan (a fifth of the layers with 3-bit keys and 4-bit values, the others 2/2), every sequence with
a half full open page. The launch of a layer's attention stores the new rows: append is what that adds to a launch that finds
them stored. Sealing a page every 128 steps is counted at 1/128. fp16 is the fastest of PyTorch's
scaled-dot-product attention backends on one layer, times 32. Two comparisons: at the same batch, and both at the batch that
fills the memory given. A layer's time is measured on that layer's whole cache with a cold L2.
"""
import argparse

import torch

import attend_bench as bench

LAYERS, WIDE_LAYERS = 32, 6
PLANS = (((2, 2), LAYERS - WIDE_LAYERS), ((3, 4), WIDE_LAYERS))
MODELS = (("Llama-2-7B", 32, 32), ("Llama-3-8B", 32, 8))


def step(lib, batch, q_heads, kv_heads, length, repeat):
    """Milliseconds of attention, append and sealing, and bytes of the packed cache, of all layers."""
    attend = append = seal = 0.0
    size = 0
    for bits, layers in PLANS:
        cache = bench.Packed(lib, bits, batch, q_heads, kv_heads, length, open_page=True)
        stored = layers * bench.timed([cache.launch], repeat)
        cache.store_new()
        attend += stored
        append += layers * bench.timed([cache.launch], repeat) - stored
        size += layers * cache.memory
        del cache
        work = bench.Sealing(lib, bits, batch, kv_heads, True)
        seal += layers * bench.timed([work.seal], repeat) / bench.PAGE
        del work
        torch.cuda.empty_cache()
    return attend, append, seal, size


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--gigabytes", type=float, default=100.0, help="memory of the whole cache")
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    lib = bench.load(args.library)
    print(f"GPU {torch.cuda.get_device_name()}, copy {bench.copy_rate(args.repeat):.2f} TB/s, {args.length} tokens")
    print("| model | comparison | fp16 batch | packed batch | fp16 ms | attend ms | append ms | seal ms | throughput ratio | memory ratio |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, q_heads, kv_heads in MODELS:
        full = 4 * kv_heads * bench.DIM * args.length * LAYERS  # bytes of a sequence in fp16
        for memory in (False, True):
            first = int(args.gigabytes * 1e9 / full) if memory else args.batch
            base = LAYERS * bench.fp16(first, q_heads, kv_heads, args.length, args.repeat)[1]
            torch.cuda.empty_cache()
            second = first
            if memory:
                second = int(first * full / (step(lib, 1, q_heads, kv_heads, args.length, 3)[3]))
            attend, append, seal, size = step(lib, second, q_heads, kv_heads, args.length, args.repeat)
            ratio = base / (attend + append + seal) * second / first
            print(f"| {name} | {'same memory' if memory else 'same batch'} | {first} | {second} | {base:.3f} | {attend:.3f} | "
                  f"{append:.3f} | {seal:.3f} | {ratio:.2f} | {full * second / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
