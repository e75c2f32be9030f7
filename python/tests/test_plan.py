import pathlib

import pytest

import kvmix

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "plan.json"


def test_a_plan_file_is_read_and_written_as_it_was(tmp_path):
    plan = kvmix.Plan.read(EXAMPLE)
    assert plan.layers == [("int3.channel.g128.fitted.zero", "int2.token.g64.minmax.zero")]
    assert (plan.model, plan.sinks, plan.window, plan.recent) == ("waves", 16, 64, "int8.token.g64.minmax.zero")
    plan.write(tmp_path / "plan.json")
    assert kvmix.Plan.read(tmp_path / "plan.json").to_json() == plan.to_json()
    assert kvmix.Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_errors_are_exceptions_of_one_line(tmp_path):
    with pytest.raises(kvmix.NotFoundError, match="missing.json") as missing:
        kvmix.Plan.read(tmp_path / "missing.json")
    assert isinstance(missing.value, (kvmix.Error, LookupError)) and "\n" not in str(missing.value)
    with pytest.raises(kvmix.CorruptError, match="the text.*sinks") as corrupt:
        kvmix.Plan.from_json(EXAMPLE.read_text().replace('"sinks": 16', '"sinks": -1'), "the text")
    assert isinstance(corrupt.value, ValueError) and "\n" not in str(corrupt.value)
    with pytest.raises(kvmix.FileError) as failed:
        kvmix.Plan.read(EXAMPLE).write(tmp_path / "no folder" / "plan.json")
    assert isinstance(failed.value, OSError) and "no folder" in str(failed.value)


def test_sizes_follow_from_the_plan(tiny):
    shape = tiny.shape
    f16, packed = kvmix.Plan.f16(shape), kvmix.Plan.uniform(shape, 4, 2)
    assert f16.bytes(shape, 1000) > 2 * packed.bytes(shape, 1000)
    assert 3 < packed.bits_per_element(shape, 1000) < 8
    assert packed.bits_per_element(shape, 100000) < 4
    assert all(k.startswith("int4.") and v.startswith("int2.") for k, v in packed.layers)


def test_a_plan_belongs_to_its_model(tiny, other_tiny):
    plan = kvmix.Plan.uniform(tiny.shape, 4, 4)
    plan.check(tiny.shape)
    with pytest.raises(kvmix.MismatchError, match="tiny.*other"):
        plan.check(other_tiny.shape)
    plan.check(other_tiny.shape, force=True)
    with pytest.raises(kvmix.MismatchError, match="layers"):
        kvmix.Plan.read(EXAMPLE).check(tiny.shape, force=True)
    with pytest.raises(kvmix.MismatchError, match="layers"):
        kvmix.Plan.read(EXAMPLE).bytes(tiny.shape, 100)


@pytest.fixture(scope="module")
def profile(tiny):
    return kvmix.profile(tiny, tokens=512, sensitivity="fisher", seed=3)


def test_a_profile_is_measured_and_kept(tiny, profile, tmp_path):
    assert profile.fingerprint == tiny.shape.fingerprint and profile.seed == 3
    assert len(profile.key_score) == len(tiny.shape.layers) and min(profile.key_score) > 0
    metrics = {metric for metric, *_ in profile.sensitivities}
    assert "fisher" in metrics
    profile.write(tmp_path / "profile.json")
    assert kvmix.Profile.read(tmp_path / "profile.json").to_json() == profile.to_json()


def test_plans_meet_their_budget(tiny, profile):
    for bits in (3.5, 5):
        plan = kvmix.plan(tiny, profile, bits=bits, context=1024)
        assert plan.bits_per_element(tiny.shape, 1024) <= bits
        assert plan.predicted and plan.predicted[0] == "fisher"
    in_bytes = kvmix.plan(tiny.shape, profile, bytes=plan.bytes(tiny.shape, 1024) * 2, sequences=2, context=1024)
    assert in_bytes.bytes(tiny.shape, 1024) <= plan.bytes(tiny.shape, 1024)
    with pytest.raises(kvmix.BudgetError) as small:
        kvmix.plan(tiny, profile, bits=0.5, context=1024)
    assert isinstance(small.value, kvmix.InvalidArgumentError)
    assert 0 < small.value.least_bytes < plan.bytes(tiny.shape, 1024)


def test_planners_take_their_options(tiny, other_tiny, profile):
    names = [name for name, _ in kvmix.planners()]
    assert {"kvmix", "uniform"} <= set(names)
    plan = kvmix.plan(tiny, planner="uniform", k_bits=8, v_bits=3)
    assert all(k.startswith("int8.") and v.startswith("int3.") for k, v in plan.layers)
    with pytest.raises(kvmix.InvalidArgumentError, match="colour"):
        kvmix.plan(tiny, planner="uniform", colour="red")
    with pytest.raises(kvmix.InvalidArgumentError, match="no such planner|no planner|unknown"):
        kvmix.plan(tiny, planner="nobody")
    with pytest.raises(kvmix.MismatchError, match="tiny.*other"):
        kvmix.plan(other_tiny, profile, bits=4)
    with pytest.raises(kvmix.InvalidArgumentError, match="give one"):
        kvmix.plan(tiny, profile, bits=4, bytes=1 << 20)
    with pytest.raises(kvmix.InvalidArgumentError, match="not its shape"):
        kvmix.plan(tiny.shape, profile, bits=4, measure=4)


def test_progress_is_told_and_may_stop(tiny):
    told = []

    def stop(done, total, what):
        told.append((done, total, what))
        if len(told) == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        kvmix.profile(tiny, tokens=256, progress=stop)
    assert len(told) == 2 and told[0][1] > 0 and isinstance(told[0][2], str)
