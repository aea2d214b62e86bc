"""A Markdown file as one web page that stands alone: its pictures are inside it, it asks no server for anything."""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; } h1 { margin-top: .5rem; }
img { max-width: 100%; height: auto; background: #fff; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td:last-child { white-space: nowrap; }
blockquote { margin: .6rem 0; padding: .2rem 1rem; border-left: 3px solid #1f5fa8; background: #f5f8fc; }
pre { overflow-x: auto; padding: .7rem; background: #f5f5f5; font-size: 13px; } summary { cursor: pointer; }
@media (prefers-color-scheme: dark) {
  body { background: #181a1d; color: #ddd; } th, td { border-color: #444; }
  blockquote { background: #20262e; } pre { background: #222; }
}
"""
PICTURE = re.compile(r'<img src="([^":]+)"')


def web_page(text: str, folder: Path) -> str:
    """The page of a Markdown text whose pictures are named relative to `folder`."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = PICTURE.sub(lambda found: f'<img src="{embedded(folder / html.unescape(found[1]))}"', body)
    heading = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "Report")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}</body></html>\n"
    )


def embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
