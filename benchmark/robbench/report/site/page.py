"""HTML elements and whole pages. Text is escaped wherever it is not `Html`.

Every page is one file. Its style, its script and its data are inside it. The Content-Security-Policy allows exactly
this style and this script by their SHA-256, and pictures of the same folder. So a page loads nothing from the network,
and opens from file:// in every browser ('self' does not cover file:// in some browsers, therefore `file:`).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from robbench.core.files import read_bounded
from robbench.report.escape import escape_html

__all__ = ["Html", "join", "keep_whole", "link", "list_items", "make_document", "make_path", "tag"]

_ASSETS = Path(__file__).parent / "assets"
_VOID = {"br", "img", "input", "meta", "wbr"}
_MOST = 2**20  # bytes of an asset
_WHOLE = re.compile(
    r"\[[^\]\s]+, [^\]\s]+\](?: /)?"  # an interval: [97.7, 99.6], or [97.7, 99.6] /
    r"|– / [\d.]+"  # a number of the paper beside none of ours: – / 98.97
    r"|[\d.]+ (?:%|\([+-−][\d.]+\))"  # 5 %, and a number with its difference: 98.97 (+0.1)
    r"|\w+ = [\d.]+"  # p = 0.05
    r"|(?<!\S)--[a-z][\w-]*(?: [\w/-]{1,20}(?![\w/-]))?"  # an option: --suite whitebox
    r"|(?<!\S)[\w.+]+-[\w.+-]{1,20}(?![\w-])"  # a name: PGD-20-xent
)


class Html(str):
    """Text that is HTML already. `tag` takes it as it is."""

    __slots__ = ()


def tag(name: str, /, *content: str, **attributes: str | bool | None) -> Html:
    """Make an element. Content that is not `Html`, and all attributes, are escaped.

    Args:
        name: name of the element.
        *content: what is inside it.
        **attributes: `class_` means class, and `data_value` means data-value. True means an attribute without a value;
            False and None leave it out. There is no `style`, because the policy of the page blocks it.
    """
    texts = []
    for key, value in attributes.items():
        if value is not None and value is not False:
            attribute = key.rstrip("_").replace("_", "-")
            texts.append(f" {attribute}" if value is True else f' {attribute}="{escape_html(value)}"')
    start = f"<{name}{''.join(texts)}>"
    return Html(start if name in _VOID else f"{start}{join(*content)}</{name}>")


def join(*parts: str) -> Html:
    """Join parts; those that are not `Html` are escaped."""
    return Html("".join(part if isinstance(part, Html) else escape_html(part) for part in parts))


def keep_whole(text: str) -> Html:
    """Convert text so that no line breaks inside names with hyphens, intervals, and numbers with their units."""
    parts, end = [], 0
    for match in _WHOLE.finditer(text):
        parts += [text[end : match.start()], tag("span", match[0], class_="whole")]
        end = match.end()
    return join(*parts, text[end:])


def make_path(*parts: str) -> str:
    """Join names to a relative address. Each name is one part of it, whatever characters it has."""
    return "/".join(quote(part, safe="") for part in parts)


def link(text: str, address: str, **attributes: str | bool | None) -> Html:
    """Make a link to a page of the site; the address is from `make_path`, with `../` or a #fragment."""
    return tag("a", text, href=address, **attributes)


def list_items(items: Iterable[str], **attributes: str | bool | None) -> Html:
    """Make a list; nothing if there are no items."""
    found = [tag("li", item) for item in items]
    return tag("ul", *found, **attributes) if found else Html("")


@functools.cache
def _read_asset(name: str) -> str:
    return read_bounded(_ASSETS / name, _MOST).decode()


def _allow(text: str) -> str:
    """Return the source of a policy that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def make_document(title: str, *body: str, depth: int | None, data: object = None) -> str:
    """Make a page.

    Args:
        title: the title of the page.
        *body: the content of its `main`.
        depth: number of folders between the page and the site's folder; None for a page outside of a site.
        data: what the script of the page reads; JSON.
    """
    style, script = _read_asset("style.css"), _read_asset("site.js")
    policy = (
        f"default-src 'none'; script-src {_allow(script)}; style-src {_allow(style)}; img-src 'self' file:; "
        "form-action 'self' file:; base-uri 'none'"
    )
    switch = tag("button", "Dark or light", type="button", id="theme", hidden=True)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} · robbench"),
        Html(f"<style>{style}</style>"),
    ]
    inside = [
        link("Skip to the content", "#content", class_="skip"),
        tag("header", Html("") if depth is None else _navigate("../" * depth), switch),
        tag("main", tag("h1", title), *body, id="content"),
        tag("footer", tag("p", "Made by robbench from stored results. A robust accuracy is an upper bound.")),
        _embed(data),
        Html(f"<script>{script}</script>"),
    ]
    head_html, body_html = tag("head", *head), tag("body", *inside)
    return f"<!doctype html>\n{tag('html', head_html, body_html, lang='en')}\n"


def _navigate(root: str) -> Html:
    search = tag(
        "form",
        tag("label", "Find a model", for_="find"),
        tag("input", id="find", type="search", name="q", autocomplete="off"),
        tag("button", "Find", type="submit"),
        role="search",
        action=f"{root}index.html",
        method="get",
    )
    pages = [("Overview", "index.html"), ("Compare", "compare.html"), ("Paper tables", "tables.html")]
    return join(tag("nav", *[link(text, root + page) for text, page in pages], aria_label="Pages"), search)


def _embed(data: object) -> Html:
    """Embed data for the script. Without `<`, nothing in it can end the element."""
    if data is None:
        return Html("")
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="data">{text}</script>')
