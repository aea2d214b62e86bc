"""Chat with a model in the browser.

    nanochat chat_web --model out/demo/rl

This is `nanochat serve` and its page, opened: conversations are kept in the browser, answers appear as they are made
and can be stopped, asked for again or led to by another question; uses of the calculator are set off. The page is one
file without anything from elsewhere, so it works offline and on a phone (`--host 0.0.0.0`, with a key).
"""

import webbrowser
from dataclasses import dataclass, field

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.serve import ServeArguments, serve


@dataclass
class ChatWebArguments(ServeArguments):
    """What is served, where, and within which bounds; and whether a browser is opened."""

    open_browser: bool = field(
        default=True, metadata={"help": "Open the page in this machine's browser, if it has one."}
    )


def main() -> None:
    (arguments,) = parse(ChatWebArguments)

    def open_page(address: str) -> None:
        print(f"Chat with {arguments.model} at {address}/ (Ctrl-C ends it)", flush=True)
        if arguments.open_browser:
            webbrowser.open(f"{address}/")

    serve(arguments, open_page)


if __name__ == "__main__":
    run(main)
