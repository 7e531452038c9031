"""Made-up houses with known noise, so that the best reachable error of a regression is known.

usage: python scripts/make_houses.py DIR [--train N] [--valid N] [--seed S]

Writes train.csv, valid.csv (price in thousands, seven columns of numbers, a listing in words), listings.txt (the
training listings, one a line, to pretrain a text model on) and floors.json. The price is

    f(area, rooms, age, distance, floor, garden) + g(condition, view, parking) + noise,   noise ~ Normal(0, SIGMA)

where condition, view and parking stand in the listing only, in words, and are independent of the numbers. So nothing
that sees all can have an expected RMSE below SIGMA, and nothing that sees only the numbers one below
sqrt(SIGMA^2 + Var g), since E[price | numbers] = f + E[g]. ``lot`` is a number that says nothing. floors.json holds
both floors, as the formula gives them and as these ideal predictions reach on the rows of valid.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from pathlib import Path
from typing import Any

SIGMA = 20.0
"""Standard deviation of the noise, in thousands."""
NUMERIC = ("area", "rooms", "age", "distance", "floor", "garden", "lot")

WORTH: dict[str, dict[str, tuple[float, float, list[str]]]] = {
    "condition": {
        "renovated": (
            0.3,
            30.0,
            [
                "fully renovated last year .",
                "kitchen and bath are brand new .",
                "you can move in without any work .",
                "the owner has just renovated all rooms .",
            ],
        ),
        "sound": (
            0.5,
            0.0,
            [
                "in good condition .",
                "kitchen and bath are in use and clean .",
                "some paint would not hurt .",
                "well kept by the owner .",
            ],
        ),
        "neglected": (
            0.2,
            -35.0,
            [
                "kitchen and bath need work .",
                "not renovated since it was built .",
                "a project for a handy owner .",
                "you can not move in without a lot of work .",
            ],
        ),
    },
    "view": {
        "river": (0.15, 25.0, ["view of the river .", "the balcony looks out over the water .", "the river is near ."]),
        "park": (0.25, 15.0, ["view of the park .", "the windows look into old trees .", "quiet , next to the park ."]),
        "yard": (0.35, 0.0, ["view of the yard .", "the windows look into the yard .", "quiet , to the back ."]),
        "road": (0.25, -20.0, ["on the main road .", "the windows look out over the traffic .", "not quiet ."]),
    },
    "parking": {
        "garage": (0.4, 18.0, ["with a garage .", "your car has its own place .", "parking in the house ."]),
        "street": (0.6, 0.0, ["without a garage .", "parking on the street .", "there is no place for a car ."]),
    },
}
"""Attribute -> value -> (probability, worth in thousands, ways to say it)."""

CHATTER = [
    "call us today .",
    "near schools and shops .",
    "the bus stops at the door .",
    "friendly neighbours .",
    "see it before it is gone .",
    "for a family or a couple .",
    "the cellar is dry .",
    "more pictures on request .",
    "visits at the weekend only .",
]


def worth_of_numbers(row: dict[str, float]) -> float:
    """f: space is worth more near the centre, old houses regain some of what age takes, gardens and height saturate."""
    near = math.exp(-row["distance"] / 8.0)
    return (
        60.0
        + row["area"] * (1.1 + 2.6 * near)
        + 8.0 * row["rooms"]
        - 1.6 * row["age"]
        + 0.012 * row["age"] ** 2
        + 9.0 * math.log1p(row["floor"])
        + 40.0 * math.tanh(row["garden"] / 250.0)
    )


def variance_of_words() -> float:
    """Var g, from the probabilities; the attributes are independent."""
    total = 0.0
    for values in WORTH.values():
        mean = sum(p * worth for p, worth, _ in values.values())
        total += sum(p * (worth - mean) ** 2 for p, worth, _ in values.values())
    return total


def mean_of_words() -> float:
    """E[g]."""
    return sum(p * worth for values in WORTH.values() for p, worth, _ in values.values())


def make_house(draw: random.Random) -> tuple[dict[str, Any], float, float]:
    """A row, and the ideal predictions from everything and from the numbers alone."""
    area = min(240.0, max(25.0, draw.lognormvariate(4.4, 0.4)))
    is_flat = draw.random() < 0.6
    numbers = {
        "area": round(area, 1),
        "rooms": max(1, round(area / 27.0 + draw.gauss(0.0, 0.7))),
        "age": round(110.0 * draw.betavariate(1.3, 1.8)),
        "distance": round(min(30.0, draw.gammavariate(2.2, 3.2)), 2),
        "floor": draw.randint(0, 12) if is_flat else 0,
        "garden": 0 if is_flat else round(draw.uniform(30.0, 800.0)),
        "lot": draw.randint(1, 999),
    }
    worth, sentences = 0.0, draw.sample(CHATTER, draw.randint(1, 3))
    for values in WORTH.values():
        (chosen,) = draw.choices(list(values.values()), weights=[p for p, _, _ in values.values()])
        worth += chosen[1]
        sentences.append(draw.choice(chosen[2]))
    draw.shuffle(sentences)
    from_numbers = worth_of_numbers(numbers)
    price = from_numbers + worth + draw.gauss(0.0, SIGMA)
    row = {**numbers, "listing": " ".join(sentences), "price": f"{price:.3f}"}
    return row, from_numbers + worth, from_numbers + mean_of_words()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*NUMERIC, "listing", "price"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_houses(folder: Path, *, num_train: int, num_valid: int, seed: int) -> dict[str, Any]:
    """Write the files and return what is in floors.json."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    train = [make_house(draw)[0] for _ in range(num_train)]
    valid = [make_house(draw) for _ in range(num_valid)]
    write_csv(folder / "train.csv", train)
    write_csv(folder / "valid.csv", [row for row, _, _ in valid])
    listings = "".join(f"{row['listing']}\n" for row in train)
    (folder / "listings.txt").write_text(listings, encoding="utf-8", newline="\n")

    def reached(index: int) -> float:
        return math.sqrt(sum((float(house[0]["price"]) - float(house[index])) ** 2 for house in valid) / num_valid)

    floors = {
        "unit": "RMSE in thousands",
        "sigma": SIGMA,
        "expected": {"all": SIGMA, "numbers": math.sqrt(SIGMA**2 + variance_of_words())},
        "on_valid": {"all": reached(1), "numbers": reached(2)},
        "seed": seed,
        "rows": {"train": num_train, "valid": num_valid},
    }
    (folder / "floors.json").write_text(json.dumps(floors, indent=2) + "\n", encoding="utf-8", newline="\n")
    return floors


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up houses with known noise.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--valid", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    floors = make_houses(args.folder, num_train=args.train, num_valid=args.valid, seed=args.seed)
    print(json.dumps(floors, indent=2))


if __name__ == "__main__":
    main()
