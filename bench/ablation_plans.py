#!/usr/bin/env python3
"""Variants of a plan for an ablation: one ingredient taken out of it, or put into the same widths without any.

    bench/ablation_plans.py profile.json plan.json FOLDER
    kvmix eval MODEL --text TEXT --plan FOLDER/all.json --plan FOLDER/all-no-scaling.json ...

Widths stay those of plan.json; its transforms must be the profile's. `kvmix eval` prints each variant's bytes: groups of 32, sinks
and windows change them, the others do not.
"""
import copy
import json
import os
import sys


def sides(plan):
    for index, layer in enumerate(plan["layers"]):
        for name in ("key", "value"):
            if layer[name]["bits"] != 16:
                yield index, name, layer[name]


def drop(plan, *fields):
    for _, _, side in sides(plan):
        for field in fields:
            side.pop(field, None)


def set_codec(plan, which, **fields):
    for _, name, side in sides(plan):
        if name == which:
            side.update(fields)


def use_transform(plan, profile, transform):
    found = {(t["layer"], t["side"]): t for t in profile["transforms"] if t["name"] == transform}
    for index, name, side in sides(plan):
        t = found[index, name]
        side.update({field: t[field] for field in ("hadamard", "scales", "feedback") if t[field]})
        if not t["scales"]:
            side.pop("scales", None)


def centre_keys(plan, profile):
    """Symmetric codes around the mean key: an eighth of a bit less, as there are no midpoints."""
    for index, name, side in sides(plan):
        if name == "key":
            side.update(center=profile["key_mean"][index], zero_point=False)


def variants(profile, full):
    def variant(name, change):
        plan = copy.deepcopy(full)
        change(plan)
        plan["note"] = f"ablation: {name}"
        return name, plan

    yield variant("all", lambda p: None)
    yield variant("all-no-scaling", lambda p: use_transform(p, profile, "feedback"))
    yield variant("all-no-feedback", lambda p: drop(p, "feedback"))
    yield variant("all-hadamard-only", lambda p: drop(p, "feedback", "scales"))
    yield variant("all-no-transform", lambda p: drop(p, "feedback", "scales", "hadamard"))
    yield variant("all-minmax-keys", lambda p: set_codec(p, "key", fit="minmax"))
    yield variant("all-fitted-values", lambda p: set_codec(p, "value", fit="fitted"))
    yield variant("all-group-32", lambda p: (set_codec(p, "key", group=32), set_codec(p, "value", group=32)))
    yield variant("all-centred-keys", lambda p: centre_keys(p, profile))
    yield variant("all-recent-f16", lambda p: p.pop("recent"))
    for sinks in (0, 4):
        yield variant(f"all-sinks-{sinks}", lambda p: p.update(sinks=sinks))
    for window in (0, 32, 96, 128):
        yield variant(f"all-window-{window}", lambda p: p["window"].update(tokens=window))

    def bare(p):
        drop(p, "feedback", "scales", "hadamard")
        set_codec(p, "key", fit="minmax")
        set_codec(p, "value", fit="minmax")
        p.pop("recent")
        p["sinks"] = 0
        p["window"]["tokens"] = 0

    yield variant("none", bare)
    for name, change in {
        "sinks": lambda p: p.update(sinks=16),
        "window-64": lambda p: p["window"].update(tokens=64),
        "fitted-keys": lambda p: set_codec(p, "key", fit="fitted"),
        "hadamard": lambda p: [side.update(hadamard=True) for _, _, side in sides(p)],
        "feedback": lambda p: use_transform(p, profile, "feedback"),
        "scaled-feedback": lambda p: use_transform(p, profile, "scaled-feedback"),
        "group-32": lambda p: (set_codec(p, "key", group=32), set_codec(p, "value", group=32)),
    }.items():
        yield variant(f"only-{name}", lambda p: (bare(p), change(p)))


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    with open(sys.argv[1]) as profile, open(sys.argv[2]) as plan:
        profile, full = json.load(profile), json.load(plan)
    os.makedirs(sys.argv[3], exist_ok=True)
    for name, plan in variants(profile, full):
        with open(os.path.join(sys.argv[3], name + ".json"), "w") as out:
            json.dump(plan, out)


main()
