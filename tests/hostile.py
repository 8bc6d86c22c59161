# SPDX-License-Identifier: Apache-2.0
"""Texts that attack whoever shows them, and what a page is to a browser."""

from html.parser import HTMLParser

MARK = "document.documentElement.dataset.pwned=1"
PAYLOADS = (
    f"<script>{MARK}</script>",
    f"</script><script>{MARK}</script>",
    f"<img src=x onerror={MARK}>",
    f'"><img src=x onerror="{MARK}">',
    f"'><svg onload={MARK}>",
    f"<svg><script>{MARK}</script></svg>",
    f"</text></svg><script>{MARK}</script>",
    f"<iframe srcdoc='<script>parent.{MARK}</script>'>",
    f"<a href=javascript:{MARK}>x</a>",
    f'" autofocus onfocus={MARK} x="',
    f"</style><script>{MARK}</script>",
    f"</title><script>{MARK}</script>",
    f"<details open ontoggle={MARK}>",
    f"<math><mi xlink:href=javascript:{MARK}>x",
    f"<body onload={MARK}>",
    f"-->]]><script>{MARK}</script>",
    f"&lt;script&gt;{MARK}&lt;/script&gt;",
    f"<scr\x00ipt>{MARK}</scr\x00ipt>",
    f"\u202e<script>{MARK}</script>\x1b[31m",
    f"{{{{constructor.constructor('{MARK}')()}}}} ${{{MARK}}} datum['{MARK}']",
    f"[x](javascript:{MARK}) ![x](x) `<b>` | a |",
)

ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h3", "h4", "p", "nav", "ul", "li", "main", "section",
    "b", "figure", "figcaption", "svg", "g", "path", "rect", "text", "line", "defs", "clippath", "circle", "div", "table", "caption",
    "thead", "tbody", "tr", "th", "td", "article", "img", "span", "del", "ins", "br",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of each table's cells."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def assert_harmless(page: str) -> None:
    """No element, no attribute and no address that is not one of ours."""
    found = Page(page)
    assert {tag for tag, _ in found.elements} <= ELEMENTS
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("href", "src", "xlink:href", "action", "srcdoc"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/webp;base64,")), (tag, name, value)
