"""A page that is one file: everything in it, nothing fetched, all text escaped, and a policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

NOTICE = "Research use only. Not for diagnosis or treatment."


class Markup(str):
    """Text that is HTML already; any other text is escaped where it is put into a page."""


def escaped(value: object) -> Markup:
    """HTML of a value: markup as it is, all else as text."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def tag(element: str, /, *content: object, **attributes: object) -> Markup:
    """An element with escaped content and attributes.

    ``class_`` is written ``class``, other underscores become hyphens; an attribute that is None or False is left out,
    one that is True has no value.
    """
    parts = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escaped(value)}"')
    return Markup(f"<{' '.join(parts)}>{joined(content)}</{element}>")


def void_tag(element: str, /, **attributes: object) -> Markup:
    """An element without content, such as img."""
    return Markup(tag(element, **attributes).removesuffix(f"</{element}>"))


def joined(parts: Iterable[object]) -> Markup:
    """All parts, escaped where they are text."""
    return Markup("".join(escaped(part) for part in parts))


def data_uri(data: bytes, kind: str) -> str:
    """``data:`` address of a picture; ``kind`` is jpeg or png."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def data_block(name: str, value: Any) -> Markup:
    """JSON for the page's script, in an element that is never run."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # nothing in it may end the element or begin another one
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')


def document(title: str, body: Sequence[Markup]) -> str:
    """A whole page: head with its policy, style and script inside, and a notice at the end."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    head = joined(
        (
            Markup('<meta charset="utf-8">'),
            void_tag("meta", http_equiv="Content-Security-Policy", content=policy),
            void_tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            void_tag("meta", name="robots", content="noindex"),
            tag("title", title),
            Markup(f"<style>{style}</style>"),
        )
    )
    foot = tag("footer", tag("p", tag("strong", NOTICE)))
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join((*body, foot))
        + f"\n<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("lungseg.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
