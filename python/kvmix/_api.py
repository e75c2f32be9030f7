"""Profile, plan, evaluate, attend."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import _native
from ._cache import Cache, one_layer
from ._errors import InvalidArgumentError
from ._native import Model, ModelShape, Plan, Profile

Progress = Callable[[float, float, str], Any]
"""Called with work done, total, and a label. What it raises stops the work and is raised."""


def profile(
    model: Model,
    *,
    text: str | os.PathLike[str] | None = "built-in",
    prompts: int = 2,
    tokens: int = 0,
    seed: int = 0,
    sensitivity: str | None = "fisher",
    windows: int = 1,
    device: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """Measures how much each layer's keys and values matter to a model, as `kvmix profile` does.

    text: a calibration file, .txt or .jsonl of {"text": ...}, best one like what the model will read; "built-in": English prose;
    None: the project's prompts, continued by the model.
    tokens: of each of the `prompts`, which are the windows; 0: 2048, or the model's context. sensitivity: "fisher" (from
    gradients), "kl" (on the running cache), "output" (attention output), in nats per token, or None for gradient scores
    alone. device: "cuda" runs the model's passes on a GPU. Takes one to three minutes and .7 GB for a model of 135M on two cores. Raises
    InvalidArgumentError, NotFoundError, CorruptError naming file and line.
    """
    return _native.make_profile(
        model, "" if text is None else os.fspath(text), prompts, tokens, seed, sensitivity, windows, device, threads, progress
    )


def plan(
    model: Model | ModelShape,
    profile: Profile | None = None,
    *,
    bits: float = 0,
    bytes: int = 0,
    context: int = 8192,
    sequences: int = 1,
    planner: str = "kvmix",
    measure: int = 0,
    text: str | os.PathLike[str] | None = None,
    windows: int = 2,
    threads: int = 0,
    progress: Progress | None = None,
    **options: object,
) -> Plan:
    """Chooses a codec for every layer, keys and values apart, under a budget, as `kvmix plan` does.

    bits: on average per number, all bytes included, at `context` tokens; or bytes: of `sequences` sequences of `context`
    tokens together. measure: up to so many whole plans are measured on text (needs a Model). Further options are those of
    the planner, with underscores: recent="f16". Raises BudgetError, whose least_bytes says what can be met, and
    InvalidArgumentError naming the option or planner.
    """
    if bits and bytes:
        raise InvalidArgumentError("plan: bits and bytes are both budgets; give one")
    shape = model.shape if isinstance(model, Model) else model
    named = {name.replace("_", "-"): str(value) for name, value in options.items()}
    if not measure:
        return _native.make_plan(shape, profile, planner, bits, bytes, context, sequences, named)
    if not isinstance(model, Model):
        raise InvalidArgumentError("plan: measure runs the model; give a kvmix.Model, not its shape")
    if profile is None:
        raise InvalidArgumentError("plan: measure starts from a profile; make one with kvmix.profile(model)")
    return _native.make_measured_plan(
        model, profile, planner, bits, bytes, context, sequences, named, measure,
        "" if text is None else os.fspath(text), windows, threads, progress,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvalRow:
    """A cache against the model's own with everything in fp16. Divergences in nats per token.

    bits_per_element: all bytes; body_bits: of sealed pages alone; kept: part of the tokens that a token policy left; lost: why a peer has no numbers.
    """

    name: str
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_stderr: float
    kl_p99: float
    kl_max: float
    top1: float
    bits_per_element: float
    body_bits: float
    kept: float
    cache_bytes: int
    scored_tokens: int
    kl_by_position: list[tuple[int, float]]
    seconds: float
    lost: str


def evaluate(
    model: Model,
    text: str,
    plans: Mapping[str, Plan] | Sequence[Plan],
    *,
    peers: Sequence[str] = (),
    context: int = 2048,
    windows: int = 8,
    kernel: str = "",
    exact: bool = False,
    float_weights: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[EvalRow]:
    """What caches cost in quality on a text (the text itself, not a file): the numbers of `kvmix eval --json`.

    The second half of each of `windows` windows of `context` tokens is scored; 0 windows: as many as the text has. The first
    row is the f16 cache. peers: llama.cpp's cache types ("f16", "q8_0", "q4_0"), run in this process. Raises MismatchError for
    another model's plan, InvalidArgumentError for too short a text.
    """
    named = list(plans.items()) if isinstance(plans, Mapping) else [(p.note or f"plan {i}", p) for i, p in enumerate(plans)]
    rows = _native.evaluate_plans(
        model, text, named, list(peers), context, windows, kernel, exact, float_weights, force, threads, progress
    )
    return [EvalRow(**row) for row in rows]


def attend(
    query: Any,
    key: Any,
    value: Any,
    *,
    key_bits: int = 16,
    value_bits: int = 16,
    scale: float | None = None,
    softcap: float = 0.0,
    sliding_window: int = 0,
    threads: int = 0,
    **options: object,
) -> Any:
    """Causal attention of the newest queries over keys and values that are stored in so many bits: what a cache would compute.

    query: float32 [queries, q_heads, head_dim], those of the last tokens; key, value: [tokens, kv_heads, head_dim]; returns
    an array like query. What stands before the queries is packed as a cache packs it: sinks and newest tokens are not.
    scale: of q.k, None: head_dim ** -0.5; softcap in logits; sliding_window in tokens; options: the planner `uniform`'s.
    """
    tokens, queries = len(key), len(query)
    if not 1 <= queries <= tokens:
        raise InvalidArgumentError(f"attend: {queries} queries over {tokens} keys; expected 1 query to as many as keys")
    for name, array in (("query", query), ("key", key), ("value", value)):
        if len(array.shape) != 3:
            raise InvalidArgumentError(f"{name} has {len(array.shape)} axes; expected [rows, heads, head_dim]")
    shape = one_layer(int(query.shape[1]), int(key.shape[1]), int(query.shape[2]), [(sliding_window, scale, softcap)])
    named = {name.replace("_", "-"): str(v) for name, v in options.items()}
    cache = Cache(Plan.uniform(shape, key_bits, value_bits, named), shape, threads=threads)
    sequence = cache.create()
    before = tokens - queries
    if before:
        # What the earlier tokens attend to is of no interest; every row needs a query all the same.
        heads = query.shape[1] // key.shape[1]
        earlier = key[:before].repeat(heads, 1) if isinstance(key, _numpy()) else key[:before].repeat_interleave(heads, 1)
        with cache.step([(sequence, before)]) as step:
            step.attend(0, earlier, key[:before], value[:before])
    with cache.step([(sequence, queries)]) as step:
        return step.attend(0, query, key[before:], value[before:])


def _numpy() -> type:
    import numpy as np

    return np.ndarray
