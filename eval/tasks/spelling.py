"""Spelling: what a model of tokens cannot see, the letters of a word, taught letter by letter.

Two tasks about the words given: spelling a word out, and counting a letter in it (upstream's simple spelling and
spelling bee; words and wordings are ours). Counting is done
twice, by spelling and marking every hit, and by the calculator (`'strawberry'.count('r')`); questions come in many
wordings and several languages, so that the skill is not tied to a phrase. The solution costs about eight tokens a
letter: long words are long examples.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_LETTERS = 15  # longer words are rare, and their solutions do not fit a short context

SPELL_QUESTIONS = (
    "Spell the word: {word}",
    "Spell {word}",
    "How do you spell {word}?",
    "How is {word} spelled?",
    "Which letters make up the word {word}?",
)
COUNT_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are in the word {word}?",
    "How many {letter}s are there in {word}?",
    "How many times does {letter} appear in {word}?",
    "How often does the letter {letter} occur in {word}?",
    "Count the {letter} in {word}",
    "Count the number of {letter} letters in the word {word}.",
    "In the word {word}, how many {letter} are there?",
    "What is the number of {letter} in {word}?",
    "Number of {letter} in {word}?",
    "Tell me how many {letter} {word} has.",
    "{word}: how many {letter}?",
    "Wie viele {letter} sind in {word}?",  # German
    "Wie oft kommt {letter} in {word} vor?",
    "Combien de {letter} y a-t-il dans {word} ?",  # French
    "¿Cuántas {letter} hay en {word}?",  # Spanish
    "Quantas {letter} há em {word}?",  # Portuguese
    "Quante {letter} ci sono in {word}?",  # Italian
    "Hoeveel {letter} zitten er in {word}?",  # Dutch
    "Сколько букв {letter} в слове {word}?",  # Russian
    "{word}に{letter}はいくつありますか?",  # Japanese
    "{word}中有几个{letter}?",  # Chinese
)


def spelling_problems(words: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Rows {"messages"} of spelling alone, without end, the same for the same words and seed."""
    return rows_about(words, seed, spell)


def counting_problems(words: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """Rows {"messages", "answer"} of counting alone."""
    return rows_about(words, seed, count_letter)


def rows_about(
    words: Sequence[str], seed: int, make: Callable[[str, random.Random], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    words = usable_words(words)
    while True:
        yield make(rng.choice(words), rng)


def usable_words(words: Sequence[str]) -> list[str]:
    usable = [word for word in words if word.isalpha() and 2 <= len(word) <= MAX_LETTERS]
    if not usable:
        raise ValueError(f"none of the {len(words)} words has 2 to {MAX_LETTERS} letters and nothing else")
    return usable


def spell(word: str, rng: random.Random) -> dict[str, Any]:
    question = rng.choice(SPELL_QUESTIONS).format(word=word)
    answer = f"{word}:{','.join(word)}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def count_letter(word: str, rng: random.Random) -> dict[str, Any]:
    """{"messages", "answer"}: one question in ten is about a letter that the word may not have."""
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.1 else rng.choice(word)
    quoted = rng.choice(("{}", "'{}'", '"{}"'))
    question = rng.choice(COUNT_QUESTIONS).format(letter=quoted.format(letter), word=quoted.format(word))
    lines, hits = [], 0
    for position, character in enumerate(word, start=1):
        hits += character == letter
        lines.append(f"{position}:{character}" + (f" hit {hits}" if character == letter else ""))
    spelled = f"{word}:{','.join(word)}\n\nCounting '{letter}':\n" + "\n".join(lines) + f"\nThat makes {hits}. Check: "
    solution = [
        {"type": "text", "text": spelled},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(hits)},
        {"type": "text", "text": f"\n\n#### {hits}"},
    ]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    return {"messages": messages, "answer": str(hits)}
