"""Sailings and customers. A customer follows from their number alone."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from polyturn import ListTasks, Task

ISLANDS = ("Averøy", "Brenna", "Colm", "Dunnet", "Ersay", "Fetlar", "Gigha", "Havra")
SPLITS = {"train": range(2000), "heldout": range(2000, 2200)}


@dataclass(frozen=True)
class Sailing:
    """One ferry that leaves."""

    code: str
    departs: str
    price: int
    sold_out: bool

    def line(self) -> str:
        """What the timetable says of it: not whether it is sold out."""
        return f"{self.code}: departs {self.departs}, {self.price} crowns"


@dataclass(frozen=True)
class Customer:
    """Who stands at the desk, and what they have not said yet."""

    origin: str
    destination: str
    not_before: str
    sailings: tuple[Sailing, ...]

    @property
    def best(self) -> Sailing:
        """The cheapest sailing that they can take."""
        possible = [s for s in self.sailings if s.departs >= self.not_before and not s.sold_out]
        return min(possible, key=lambda sailing: sailing.price)


def make_customer(number: int) -> Customer:
    """The customer of that number."""
    rng = random.Random(f"ferry desk {number}")
    origin, destination = rng.sample(ISLANDS, 2)
    times = sorted(rng.sample([f"{h:02d}:{m:02d}" for h in range(6, 22) for m in (0, 15, 30, 45)], 6))
    prices = rng.sample(range(80, 400), 6)
    codes = rng.sample(range(100, 1000), 6)
    not_before = times[rng.randint(1, 3)]
    later = [index for index, time in enumerate(times) if time >= not_before]
    # The cheapest of those that would do is sold out for every other customer.
    gone = min(later, key=lambda index: prices[index]) if rng.random() < 0.5 else None
    sailings = tuple(
        Sailing(code=f"F{codes[i]}", departs=times[i], price=prices[i], sold_out=i == gone) for i in range(6)
    )
    return Customer(origin=origin, destination=destination, not_before=not_before, sailings=sailings)


@functools.cache
def make_tasks(split: str) -> ListTasks:
    """The customers of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return ListTasks([_make_task(number) for number in SPLITS[split]])


def _make_task(number: int) -> Task:
    customer = make_customer(number)
    wish = f"A ticket from {customer.origin} to {customer.destination}, please, as cheap as you can."
    return Task.from_prompt(f"customer-{number}", wish, label=customer)
