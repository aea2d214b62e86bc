"""Factors: `Find a factor of 15743.`, a problem that is solved by trying, with the calculator as the judge of a try.

A number is the product of one of six small primes and of a prime beyond them, so its digits tell nothing that a small
network could see. A try is one division, `15743/13`: a whole quotient means a factor. What is taught are solutions as
people leave them: some divisions, in no order, until one works or they have had enough and look the answer up. All
these answers are right, but the work that stands before them often does not lead there. To go on until a division
works, and to try nothing twice, always leads there; that is left to reinforcement, which sees nothing but whether an
answer is right.

`generate` yields rows {"messages", "answer", "checker"} without end, the same for the same seed; the answer is the
number itself, which `is_correct` divides.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from modeling_nanochat.tool_use import calculate

PRIMES = (7, 11, 13, 17, 19, 23)
DIGITS = 5
ENOUGH = 0.5  # how likely a person is to have had enough after a division that does not work
FINAL = re.compile(r"#### (\d+)")


def generate(seed: int, systematic: bool = False) -> Iterator[dict[str, Any]]:
    """Numbers of five digits, factored as people do, or by the whole search: the primes in order until one fits."""
    rng = random.Random(seed)
    while True:
        prime = rng.choice(PRIMES)
        number = prime * large_prime(rng, 10 ** (DIGITS - 1) // prime + 1, 10**DIGITS // prime)
        order = list(PRIMES) if systematic else rng.sample(PRIMES, len(PRIMES))
        tries = order[: order.index(prime) + 1]
        if not systematic:
            patience = 1
            while patience < len(tries) and rng.random() >= ENOUGH:
                patience += 1
            tries = tries[:patience]
        yield problem(number, tries, prime)


def large_prime(rng: random.Random, low: int, high: int) -> int:
    while True:
        found = rng.randint(low, high)
        if all(found % divisor for divisor in range(2, int(found**0.5) + 1)):
            return found


def problem(number: int, tries: list[int], factor: int) -> dict[str, Any]:
    """The row of a number, of the divisors that are tried and of the factor that is then named."""
    parts = []
    for divisor in tries:
        division = f"{number}/{divisor}"
        parts += [
            {"type": "python", "text": division},
            {"type": "python_output", "text": calculate(division)},
            {"type": "text", "text": "\n"},
        ]
    parts[-1] = {"type": "text", "text": f"\n#### {factor}"}
    messages = [{"role": "user", "content": f"Find a factor of {number}."}, {"role": "assistant", "content": parts}]
    return {"messages": messages, "answer": str(number), "checker": "factor"}


def is_correct(completion: str, number: str) -> bool:
    """Whether what follows the first `#### ` divides the number, and is neither 1 nor the number itself."""
    found = FINAL.search(completion)
    return bool(found) and 1 < int(found.group(1)) < int(number) and int(number) % int(found.group(1)) == 0
