"""Pages as tests read them: their code blocks, the commands they show, their links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHELL = ("sh", "bash", "shell", "console")
PROGRAMS = {
    "nanochat",
    "accelerate",
    "torchrun",
    "make",
    "bash",
    "python",
    "python3",
    "pip",
    "curl",
    "transformers",
    "git",
    "hf",
}
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
MESSAGE = re.compile(r"nanochat \w+: ")  # how a recipe says what is wrong
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code: `language` is "" for indented blocks and fences that name none."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced and the indented blocks of a page, in their order."""
    found, lines, at = [], text.split("\n"), 0
    while at < len(lines):
        start, fence = at, re.fullmatch(r"```([\w{}]*)\s*", lines[at])
        if fence:
            at += 1
            while lines[at].rstrip() != "```":
                at += 1
            found.append(Block(fence.group(1), "\n".join(lines[start + 1 : at]), start + 2))
        elif lines[at].startswith("    ") and (not at or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            found.append(Block("", "\n".join(line[4:] for line in lines[start:at]).rstrip(), start + 1))
            continue
        at += 1
    return found


def prose(text: str) -> str:
    """A page without what stands in its fenced and indented blocks."""
    lines = text.split("\n")
    for block in blocks(text):
        for at in range(block.line - 1, block.line + block.text.count("\n")):
            lines[at] = ""
    return "\n".join(lines)


def is_command(line: str) -> bool:
    if MESSAGE.match(line):
        return False
    words = line.removeprefix("$ ").split()
    while words and ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    return bool(words) and Path(words[0]).name in PROGRAMS


def commands(text: str) -> list[str]:
    """Every command of a page, in blocks and between backquotes, each on one line.

    In a block that says it is shell all lines are commands; in others those that begin with a known program. Between
    backquotes a program's name alone is a name; `...` means that something is left out.
    """
    found = []
    for block in blocks(text):
        if block.language and block.language not in SHELL:
            continue
        for line in block.text.replace("\\\n", " ").split("\n"):
            line = re.split(r"\s+#\s", line)[0].strip()
            if line and not line.startswith("#") and (block.language in SHELL or is_command(line)):
                found.append(line.removeprefix("$ "))
    for span in INLINE.findall(prose(text)):
        if " " in span and is_command(span):
            found.append(span)
    return found


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures, without those to other sites."""
    return [target for target in LINK.findall(prose(text)) if not re.match(r"[a-z]+:", target)]
