"""kvmix.transformers.Generator against transformers' own generate, on each device."""

import pytest

torch = pytest.importorskip("torch", reason="kvmix.transformers needs torch")
pytest.importorskip("transformers", reason="kvmix.transformers needs transformers")

from test_transformers import assert_same_tokens, continued, f16, ids, llama, make_model, models, page_bytes  # noqa: E402, F401

import kvmix  # noqa: E402
from kvmix.transformers import Generator, model_shape, use_kvmix  # noqa: E402


def padded(rows=4, tokens=120):
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :30] = 0
    return ids(rows, tokens), mask


def test_f16_plans_give_transformers_tokens(models):  # noqa: F811
    exact, ours = models
    tokens, mask = padded()
    want = continued(exact, tokens, attention_mask=mask, max_new_tokens=40)
    generator = Generator(ours, kvmix.Plan.f16(model_shape(ours)))
    for chunk in (2048, 50):  # twice: graphs of the first run serve the second
        assert_same_tokens(generator.generate(tokens, mask, max_new_tokens=40, chunk=chunk), want, 130)
    if generator.graph:
        assert 0 < generator.captures < 8


def test_captured_steps_are_steps_one_by_one(llama):  # noqa: F811
    """To the bit, over pages that are sealed in between and work lists that grow."""
    _, ours = llama
    plan = kvmix.Plan.uniform(model_shape(ours), 2, 2)
    tokens, mask = padded(3, 200)
    new = 300 if ours.device.type == "cuda" else 30
    eager, own = Generator(ours, plan, graph=False), Generator(ours, plan)
    want = eager.generate(tokens, mask, max_new_tokens=new)
    assert torch.equal(own.generate(tokens, mask, max_new_tokens=new), want)
    assert own.cache.pages.sealed_pages == eager.cache.pages.sealed_pages > 0
    assert eager.captures == 0 and own.captures < 40
    # Another batch, and the first again.
    assert torch.equal(
        own.generate(tokens[1:2], max_new_tokens=20)[0], eager.generate(tokens[1:2], max_new_tokens=20)[0]
    )
    assert torch.equal(own.generate(tokens, mask, max_new_tokens=new), want)


def test_compiled_steps_give_the_same_tokens(llama):  # noqa: F811
    """One compilation a number of rows, whatever the length."""
    exact, ours = llama
    tokens, mask = padded()
    want = continued(exact, tokens, attention_mask=mask, max_new_tokens=24)
    backend = "inductor" if ours.device.type == "cuda" else "eager"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = Generator(ours, kvmix.Plan.f16(model_shape(ours)), compile=backend)
    assert_same_tokens(generator.generate(tokens, mask, max_new_tokens=24), want, 130)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert generator.cache.get_seq_length() == 143


def test_a_model_compiled_otherwise_is_refused(llama):  # noqa: F811
    _, ours = llama
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="Generator.compile="):
        torch.compile(ours, backend="eager", fullgraph=True)(ids(1, 4).to(ours.device), past_key_values=f16(ours))


def test_rows_end_by_their_tokens(llama):  # noqa: F811
    exact, ours = llama
    tokens, mask = padded()
    free = Generator(ours, kvmix.Plan.f16(model_shape(ours))).generate(tokens, mask, max_new_tokens=40).cpu()
    before = ours.generation_config.eos_token_id
    try:
        ours.generation_config.eos_token_id = [int(free[0, 123]), int(free[1, 125]), int(free[2, 123]), int(free[3, 130])]
        ends = torch.tensor(ours.generation_config.eos_token_id)
        given = Generator(ours, kvmix.Plan.f16(model_shape(ours))).generate(tokens, mask, max_new_tokens=40).cpu()
    finally:
        ours.generation_config.eos_token_id = before
    lasts = [120 + int(torch.isin(row[120:], ends).int().argmax()) for row in free]
    assert given.shape[1] == max(lasts) + 1
    for row, last in enumerate(lasts):
        assert torch.equal(given[row, : last + 1], free[row, : last + 1])
        assert (given[row, last + 1 :] == 0).all()


def test_tokens_may_be_drawn(llama):  # noqa: F811
    _, ours = llama

    def draw(logits):
        return torch.multinomial((logits / 2).softmax(-1), 1)[:, 0]

    tokens, mask = padded()
    generator = Generator(ours, kvmix.Plan.uniform(model_shape(ours), 4, 4), choose=draw)
    answers = [generator.generate(tokens, mask, max_new_tokens=30) for _ in range(2)]
    assert answers[0].shape == (4, 150) and not torch.equal(*answers)


@pytest.mark.parametrize("share", [True, False])
def test_several_answers_to_a_prompt(llama, share):  # noqa: F811
    _, ours = llama
    tokens, mask = padded(2)
    generator = Generator(ours, kvmix.Plan.uniform(model_shape(ours), 4, 4))
    one = [generator.prefill(tokens, mask).clone()] + [generator.step().clone() for _ in range(5)]
    alone = page_bytes(generator.cache)
    generator.prefill(tokens, mask)
    generator.repeat(3, share=share)
    # So few tokens are all in open pages, whose last is copied in any case.
    assert share or page_bytes(generator.cache) > 2 * alone
    for want in one[1:]:
        given = generator.step()
        assert torch.equal(given, want.repeat_interleave(3))
    assert len(generator.cache.sequences) == 6


def test_what_cannot_work_is_refused(llama):  # noqa: F811
    _, ours = llama
    plan = kvmix.Plan.f16(model_shape(ours))
    generator = Generator(ours, plan)
    with pytest.raises(kvmix.InvalidArgumentError, match="max_new_tokens is 0"):
        generator.generate(ids(1, 4), max_new_tokens=0)
    with pytest.raises(kvmix.InvalidArgumentError, match=r"attention_mask has shape \(1, 3\)"):
        generator.generate(ids(1, 4), torch.ones(1, 3), max_new_tokens=2)
    with pytest.raises(kvmix.InvalidArgumentError, match="input_ids has shape"):
        generator.generate(ids(1, 4)[0], max_new_tokens=2)
    with pytest.raises(kvmix.InvalidArgumentError, match="empty cache"):
        Generator(ours, plan).step()
    if ours.device.type == "cpu":
        with pytest.raises(kvmix.UnsupportedError, match="graph=True"):
            Generator(ours, plan, graph=True)
        return
    with pytest.raises(kvmix.InvalidArgumentError, match="torch.cuda.stream"):
        with torch.no_grad():
            ours(ids(1, 4).cuda(), past_key_values=generator.cache)


def test_a_step_that_fails_leaves_nothing(llama):  # noqa: F811
    _, ours = llama
    failing = [False]

    def choose(logits):
        if failing[0]:
            raise RuntimeError("no choice")
        return logits.argmax(-1)

    tokens = ids(2, 50)
    generator = Generator(ours, kvmix.Plan.f16(model_shape(ours)), choose=choose)
    want = generator.generate(tokens, max_new_tokens=10)
    generator.prefill(tokens)
    failing[0] = True
    for _ in range(1 if ours.device.type == "cpu" else 0):  # what was captured does not ask again
        with pytest.raises(RuntimeError, match="no choice"):
            generator.step()
    failing[0] = False
    assert torch.equal(generator.generate(tokens, max_new_tokens=10), want)


def test_length_dependent_embeddings_are_not_captured():
    ours = use_kvmix(make_model("llama"))
    ours.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not Generator(ours, kvmix.Plan.f16(model_shape(ours))).graph
