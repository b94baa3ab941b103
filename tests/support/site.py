"""Read the pages of `robbench report`."""

from html.parser import HTMLParser

from robbench.models.card import Registry
from robbench.report.site.build import write_site


class Page(HTMLParser):
    """What a page consists of.

    Attributes:
        elements: name and attributes of each element.
        texts: text of each element that has no element inside it: (name, text).
        text: all text that a reader sees.
    """

    def __init__(self, path):
        super().__init__()
        self.path, self.elements, self.texts, self._open = path, [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self):
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))

    def inside(self, tag):
        return [text for name, text in self.texts if name == tag]


def make_site(root, out, cards=None, papers=()):
    """Write the site of a results tree and return its pages: path in the folder -> page."""
    if cards is None:
        (cards := out.parent / "cards").mkdir(exist_ok=True)
    notes = []
    write_site(root, out, Registry([cards]), papers, notes.append)
    return {str(p.relative_to(out)): Page(p) for p in sorted(out.rglob("*.html"))}, notes
