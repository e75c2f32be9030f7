#!/usr/bin/env python3
"""Writes tasks for `kvmix plan --tasks` and `kvmix eval --tasks`: two files of JSON Lines, searched.jsonl and held-out.jsonl, no
task of one in the other. Each prompt, of some 550 to 700 tokens, shows a few answers and ends where the next is to begin:

  arithmetic  a bill worked out in three steps, from a list of prices that stands far above
  copy        a list of words or a code written out again, after other lists and codes and a stretch of prose
  extract     what a table, or a paragraph, of people says of one of them, or of whom it says something

Every second task of a kind is a harder one: factors of two digits, notes that are alike, the friend of somebody instead of
somebody. What is needed stands mostly outside sinks and recent rows. The same seed writes the same files.

    bench/tasks.py --seed 1 --searched 16 --held-out 40 -o tasks
    kvmix eval qwen2.5-coder --tasks tasks/held-out.jsonl --uniform 4/4
"""
import argparse
import json
import pathlib
import random

GOODS = ("lamp rope kettle basket hammer ladder blanket candle mirror bucket needle pillow saddle teapot whistle wagon compass "
         "shovel anchor barrel bottle carpet drum easel funnel goblet hinge lantern mortar oar paddle quilt").split()
FIRST = ("Ada Bruno Clara Dario Elsa Felix Greta Hugo Irma Jonas Klara Lars Mara Nils Olga Paul Rita Sven Tilda Urban Vera "
         "Wanda Xaver Yvonne").split()
LAST = ("Abel Brandt Corvin Dahl Ekman Falk Grimm Holt Ibsen Jansen Keller Lindt Moreau Norden Olsen Palmer Quist Rausch Stern "
        "Tanner Ulrich Vogel Weiss Zeller").split()
TOWNS = "Ashford Bellmere Cranwick Dunmore Elmsworth Fernhill Glenport Harlow Ivybridge Kelstead Larkton Millbrook".split()
TRADES = "baker carpenter dentist farmer gardener jeweller lawyer mason painter sailor tailor weaver".split()
WHO = ("the ferryman", "an old clockmaker", "the postmaster", "our neighbour", "a travelling singer", "the night watchman",
       "the mayor's sister", "a young surveyor")
DID = ("waited for", "described", "walked around", "could not find", "photographed", "swept", "dreamed of", "pointed at")
WHAT = ("the empty station", "a narrow canal", "the frozen fountain", "the western gate", "a row of poplars", "the closed museum",
        "the harbour lights", "a field of barley")
WHEN = ("before breakfast", "on the last day of March", "while it rained", "after the concert", "for most of an hour",
        "without saying a word", "as the bells rang", "against all advice")


def prose(rng, sentences):
    out = []
    for _ in range(sentences):
        words = " ".join(rng.choice(part) for part in (WHO, DID, WHAT, WHEN))
        out.append(words[0].upper() + words[1:] + ".")
    return " ".join(out)


def arithmetic(rng, hard):
    prices = {name: rng.randint(13, 89) if hard else rng.randint(3, 19) for name in rng.sample(GOODS, 24)}

    def bill(goods):
        a, b = rng.sample(goods, 2)
        m, n = rng.randint(2, 9), rng.randint(12, 19) if hard else rng.randint(2, 9)
        x, y = m * prices[a], n * prices[b]
        return f"{m} of {a}, {n} of {b}", f"{m} x {prices[a]} = {x}, {n} x {prices[b]} = {y}, {x} + {y} = {x + y}"

    goods = rng.sample(sorted(prices), len(prices))  # what the last bill is of stands in no other
    bills = [bill(goods[:12]) for _ in range(9)] + [bill(goods[12:])]
    text = "Prices in coins: " + ", ".join(f"{name} {price}" for name, price in prices.items()) + ".\n\n"
    text += "".join(f"Order: {order}\nBill: {total}\n\n" for order, total in bills[:-1])
    return text + f"Order: {bills[-1][0]}\nBill:", bills[-1][1]


def code(rng, letters, groups):
    return "-".join("".join(rng.choice(letters) for _ in range(4)) for _ in range(groups))


def copy(rng, hard):
    names = rng.sample(TOWNS, 6)
    words = rng.sample(GOODS, 8)
    notes = {}
    for i, name in enumerate(names):  # hard ones differ from each other in their order alone, or are of few letters
        if i % 2 == 0:
            notes[name] = ", ".join(rng.sample(words if hard else GOODS, 8))
        else:
            notes[name] = code(rng, "KLMX", 5) if hard else code(rng, "ABCDEFGHJKLMNPQRSTUVWXYZ23456789", 3)
    text = "Notes:\n" + "".join(f"{name}: {note}\n" for name, note in notes.items())
    text += "\n" + prose(rng, 30) + "\n\nThe notes once more, in another order:\n"
    order = rng.sample(names, 3)
    text += "".join(f"{name}: {notes[name]}\n" for name in order[:-1])
    return text + f"{order[-1]}:", notes[order[-1]]


def extract(rng, hard):
    pairs = [(town, trade) for town in TOWNS for trade in TRADES]
    names = [f"{first} {last}" for first, last in zip(rng.sample(FIRST, 20), rng.sample(LAST, 20))]
    ring = rng.sample(names, len(names))
    friends = dict(zip(ring, ring[1:] + ring[:1]))
    people = {}
    for name, (town, trade) in zip(names, rng.sample(pairs, 20)):
        people[name] = {"town": town, "trade": trade, "phone": str(rng.randint(10000, 99999)), "friend": friends[name]}
    if rng.random() < 0.5:
        text = "name | town | trade | phone | friend\n"
        text += "".join(" | ".join([name, *p.values()]) + "\n" for name, p in people.items())
    else:
        text = " ".join(f"{name} of {p['town']} is a {p['trade']}, answers the telephone at {p['phone']} and is a friend of "
                        f"{p['friend']}." for name, p in people.items()) + "\n"

    def question(name):
        p = people[name]
        if hard:
            what = rng.choice(("town", "trade", "phone"))
            return f"What is the {what} of the friend of {name}?", people[p["friend"]][what]
        return rng.choice([(f"What is the phone of {name}?", p["phone"]),
                           (f"What is the trade of {name}?", p["trade"]),
                           (f"Who has the phone {p['phone']}?", name),
                           (f"Who is the {p['trade']} of {p['town']}?", name)])

    asked = [question(name) for name in rng.sample(names, 5)]
    text += "".join(f"\nQuestion: {q}\nAnswer: {a}\n" for q, a in asked[:-1])
    return text + f"\nQuestion: {asked[-1][0]}\nAnswer:", asked[-1][1]


KINDS = (arithmetic, copy, extract)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--searched", type=int, default=16, help="tasks of each kind in searched.jsonl (16)")
    parser.add_argument("--held-out", type=int, default=40, help="tasks of each kind in held-out.jsonl (40)")
    parser.add_argument("-o", "--out", default="tasks", help="the folder to write (tasks)")
    args = parser.parse_args()
    if args.searched < 1 or args.held_out < 1:
        parser.error("--searched and --held-out must be at least 1")
    rng = random.Random(args.seed)
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    seen = set()
    for name, count in (("searched", args.searched), ("held-out", args.held_out)):
        lines = []
        for i in range(count):
            for kind in KINDS:  # in turn, so that any part of a file has all of them
                prompt, answer = kind(rng, i % 2 == 1)
                while prompt in seen:
                    prompt, answer = kind(rng, i % 2 == 1)
                seen.add(prompt)
                lines.append(json.dumps({"kind": kind.__name__, "prompt": prompt, "answer": " " + answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
