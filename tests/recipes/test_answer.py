"""What is shown of an answer while its tokens come: whole characters, calls with their values, nothing after a stop."""

import pytest

from modeling_nanochat.recipes.serving.answer import Answer, Call, Vocabulary, message_parts
from modeling_nanochat.tokenization_nanochat_gpt import render_conversation, special_token_ids
from tests.toys import digit_tokenizer

CALL, VALUE = "<|python_start|>12 + 30<|python_end|>", "<|output_start|>42<|output_end|>"
ANSWERS = [
    ("Hello — 日本 👍!", "Hello — 日本 👍!"),
    (f"Add: {CALL}{VALUE}\n#### 42", "Add: [12 + 30 = 42]\n#### 42"),
    (f"{CALL} without an output", "[12 + 30] without an output"),
    (CALL, "[12 + 30]"),
    (f"{CALL}{CALL}{VALUE}{VALUE}", "[12 + 30][12 + 30 = 42][ = 42]"),
    (f"{VALUE} cut <|python_start|>1 +", "[ = 42] cut [1 +]"),
    ("<|user_start|>I am<|bos|> nobody<|python_end|>", "I am nobody"),
    ("", ""),
]


@pytest.fixture(scope="module")
def tokenizer():
    return digit_tokenizer()


def read(tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list, list[str]]:
    """Everything that is shown of a text, and its length after each token."""
    answer, shown, lengths = Answer(Vocabulary(tokenizer), stop), [], []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        shown += answer.add(token)
        lengths.append(len("".join(map(str, shown))))
        if answer.stopped:
            break
    return shown + answer.finish(), lengths


@pytest.mark.parametrize(("text", "expected"), ANSWERS)
def test_marks_become_what_a_person_reads(tokenizer, text, expected):
    shown, _ = read(tokenizer, text)
    assert "".join(map(str, shown)) == expected


def test_text_comes_at_once_and_never_half_a_character(tokenizer):
    shown, lengths = read(tokenizer, "a日b")
    assert lengths == [1, 1, 1, 2, 3] and shown == ["a", "日", "b"]
    shown, _ = read(tokenizer, f"x{CALL}{VALUE}y")
    assert shown == ["x", Call("12 + 30", "42"), "y"]
    byte = tokenizer("日", add_special_tokens=False)["input_ids"][0]
    cut = Answer(Vocabulary(tokenizer))
    assert cut.add(byte) + cut.finish() == []
    broken = Answer(Vocabulary(tokenizer))
    assert broken.add(byte) + broken.add(97) == ["\ufffda"] == [tokenizer.decode([byte, 97])]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("e t", "two"), "on"),
        ("aab", ("ab",), "a"),
        ("aaaab", ("aaab",), "a"),
        ("ends with tw", ("two",), "ends with tw"),  # only the beginning of it
        (f"is{CALL}{VALUE}!", ("is!",), "is[12 + 30 = 42]!"),  # not over a call
        (f"tw{CALL} o", ("tw o", "x"), "tw[12 + 30] o"),
        ("Grüße", ("üß",), "Gr"),
        ("abc", ("c", "b"), "a"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(tokenizer, text, stop, expected):
    shown, _ = read(tokenizer, text, stop)
    assert "".join(map(str, shown)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Add: {CALL}{VALUE}\n{CALL}, no", f"Add: {CALL}{VALUE}\n{CALL}, no"),
        (f"{VALUE} made up{VALUE}", "42 made up42"),
    ],
)
def test_what_was_shown_can_be_rendered_again(tokenizer, text, expected):
    """The parts of an answer, as a message, become the tokens that the model wrote."""
    shown, _ = read(tokenizer, text)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": message_parts(shown)}]
    ids, _ = render_conversation(tokenizer, messages)
    special = special_token_ids(tokenizer)
    answer = ids[ids.index(special["<|assistant_start|>"]) + 1 : -1]
    assert answer == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert message_parts(read(tokenizer, "")[0]) == []
