"""The chat page in a real browser (`make browser-test`): what a person does on it, at a desktop's and a phone's width.

Needs Debian's packages chromium and chromium-driver; without them every test here is skipped. Set SCREENSHOTS to a
folder to keep pictures.
"""

import os
import time
from pathlib import Path

import pytest

from modeling_nanochat.recipes.serving import engine as engine_module
from tests.browser.driver import ENTER, NULL, SHIFT, Browser, is_installed
from tests.recipes.test_serve import Server
from tests.toys import COUNT, COUNT_ANSWER, HELLO, HELLO_ANSWER, SUM, save_chat_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="no chromium and chromedriver (apt-get install chromium-driver)"),
]
LAST = "return [...document.querySelectorAll('article.assistant .text')].pop()?.innerText"
IDLE = "return document.getElementById('send').textContent === 'Send'"
TEXTS = "return [...document.querySelectorAll('article .text')].map((e) => e.innerText)"
TITLES = "return [...document.querySelectorAll('#list li button:first-child')].map((e) => e.textContent)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("page") / "toy")


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(params=[(1100, 760), (390, 760)], ids=["desktop", "phone"])
def browser(request, server):
    browser = Browser(*request.param, scale=1.5)
    browser.go(f"http://127.0.0.1:{server.port}/")
    browser.wait("return document.querySelector('.empty')?.textContent === 'You are talking to toy.'")
    set_value(browser, "temperature", 0)  # what the toy has learnt, exactly
    yield browser
    browser.close()


def set_value(browser: Browser, name: str, value: str | float) -> None:
    browser.run(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))",
        name, value,
    )  # fmt: skip


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}_{browser.run('return innerWidth')}.png")


def say(browser: Browser, text: str, expected: str | None = None) -> None:
    browser.type("#question", text + ENTER)
    if expected is not None:
        browser.wait(f"{LAST} === arguments[0] && {IDLE.removeprefix('return ')}", expected)


def open_menu(browser: Browser) -> None:
    browser.click("#menu")
    browser.wait("return document.getElementById('side').getBoundingClientRect().left === 0")


def test_a_conversation(browser, server):
    say(browser, SUM, "It is 12+30 = 42, I think.")
    assert browser.run("return document.querySelector('.call').textContent") == "12+30 = 42"
    typed = "<b>bold</b><|user_end|><script>alert(1)</script>"
    say(browser, typed)
    browser.wait(IDLE)
    assert browser.run(TEXTS)[2] == typed and not browser.run("return document.querySelector('#talk b, #talk script')")
    keep(browser, "conversation")
    browser.press("Edit")  # the last question, which goes back into the box
    assert browser.run("return document.getElementById('question').value") == typed
    assert len(browser.run(TEXTS)) == 2
    browser.run("document.getElementById('question').value = ''")
    browser.type("#question", f"a{SHIFT}{ENTER}{NULL}b")
    assert browser.run("return document.getElementById('question').value") == "a\nb"
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")  # nothing hangs out sideways
    assert browser.messages() == []


def test_stop_and_retry(browser, server, monkeypatch):
    choose = engine_module.choose

    def slowly(*arguments):
        time.sleep(0.05)
        return choose(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "choose", slowly)
        say(browser, COUNT)
        browser.wait(f"{LAST}?.length > 10")  # it appears while it is made
        assert browser.run("return document.getElementById('send').textContent") == "Stop"
        keep(browser, "growing")
        browser.click("#send")
        browser.wait(IDLE)
    stopped = browser.run(LAST)
    assert 10 < len(stopped) < len(COUNT_ANSWER) and COUNT_ANSWER.startswith(stopped.strip())
    assert browser.run("return document.querySelector('.note').textContent") == "stopped"
    server.wait_until_idle()
    browser.press("Retry")
    browser.wait(f"{LAST} === arguments[0]", COUNT_ANSWER)
    assert len(browser.run(TEXTS)) == 2


def test_several_conversations_are_kept(browser, server):
    phone = browser.run("return innerWidth") < 700
    say(browser, HELLO, HELLO_ANSWER)
    if phone:
        open_menu(browser)
        keep(browser, "menu")
    browser.click("#new")
    assert browser.run(TEXTS) == []
    say(browser, COUNT, COUNT_ANSWER)
    assert browser.run(TITLES) == [COUNT, HELLO]
    browser.go(f"http://127.0.0.1:{server.port}/")  # as if the page were opened again
    browser.wait("return document.querySelectorAll('article').length === 2")
    assert browser.run(TITLES) == [COUNT, HELLO] and browser.run(TEXTS) == [COUNT, COUNT_ANSWER]
    if phone:
        open_menu(browser)
    browser.click("#list li:nth-child(2) button:first-child")
    assert browser.run(TEXTS) == [HELLO, HELLO_ANSWER]
    browser.run("document.querySelector('#list li:nth-child(2) button:last-child').click()")
    assert browser.run(TITLES) == [COUNT] and browser.run(TEXTS) == [COUNT, COUNT_ANSWER]


def test_a_long_conversation_goes_on_with_what_fits(browser, server):
    spoken = [{"role": role, "content": f"{i}{'x' * 60}"} for i in range(3) for role in ("user", "assistant")]
    stored = {"conversations": [{"id": "a", "messages": spoken}], "chosen": 0, "temperature": 0}
    browser.run("localStorage.setItem('nanochat', JSON.stringify(arguments[0])); location.reload()", stored)
    browser.wait("return document.querySelectorAll('article').length === 6 && document.title === 'toy · nanochat'")
    say(browser, HELLO)
    browser.wait(f"{IDLE} && document.querySelectorAll('article').length === 8")
    note = browser.run("return document.querySelector('.note').textContent")
    assert note.startswith("4 earlier messages no longer fit the model's memory")  # a quarter is left for the answer


def test_settings_and_errors_reach_the_server_and_the_eye(browser, server, monkeypatch):
    requests = []
    submit = server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda request: (requests.append(request), submit(request)))
    set_value(browser, "temperature", 0.2)
    set_value(browser, "system", "Be kind.")
    say(browser, HELLO)
    browser.wait(IDLE)
    assert requests[-1].sampling.temperature == 0.2
    assert "Be kind.\n\nHello" in server.tokenizer.decode(requests[-1].prompt)
    say(browser, "x" * 3000)
    browser.wait("return document.querySelector('.error')?.textContent.includes('expected at most 255 tokens')")
    keep(browser, "error")
    say(browser, HELLO)  # the failed exchange is not told again
    browser.wait(f"{IDLE} && document.querySelectorAll('article').length === 6")
    assert "xxx" not in server.tokenizer.decode(requests[-1].prompt)
