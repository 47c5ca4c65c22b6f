"""Number the chapters as the text calls them, and lead every "chapter N" to it.

The notebooks carry their number in the file name only, and say "chapter 6" in plain words, so
that they read well in JupyterLab. In the book the number stands before the title, on the page
and in every list of contents, and the words become a link.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

NUMBERS = re.compile(r"\b[Cc]hapters? (\d+(?:, \d+)*(?:,? (?:and|to|or) \d+)?)\b")
NOT_TEXT = (nodes.title, nodes.reference, addnodes.pending_xref, nodes.literal, nodes.raw)
NOT_OURS = "Further reading"  # chapters of other books


def number(docname):
    """14 for notebooks/14_ewc, None for a page that is no chapter."""
    found = re.fullmatch(r"notebooks/(\d\d)_\w+", docname)
    return int(found[1]) if found else None


def above(node):
    while (node := node.parent) is not None:
        yield node


class Chapters(SphinxTransform):
    default_priority = 780  # before the glossary's links, which split the text

    def apply(self):
        here = number(self.env.docname)
        names = {number(name): name for name in self.env.found_docs}
        names.pop(here, None)
        names.pop(None, None)
        for text in list(self.document.findall(nodes.Text)):
            if NUMBERS.search(text) and self.is_ours(text):
                text.parent.replace(text, list(self.linked(text, names)))
        if here is not None and (title := next(self.document.findall(nodes.title), None)):
            title.insert(0, nodes.Text(f"{here}. "))

    def is_ours(self, text):
        for node in above(text):
            if isinstance(node, (*NOT_TEXT, nodes.FixedTextElement)):
                return False
            if isinstance(node, nodes.section) and node[0].astext() == NOT_OURS:
                return False
        return True

    def linked(self, text, names):
        """The text in pieces; "chapter 3" is one link, "chapters 3 and 4" are two."""
        at = 0
        for found in NUMBERS.finditer(text):
            for digits in re.finditer(r"\d+", found[1]):
                name = names.get(int(digits[0]))
                if name is None:
                    continue
                start, end = (found.start(1) + at for at in digits.span())
                start = found.start() if found[1] == digits[0] else start
                yield nodes.Text(text[at:start])
                yield self.reference(text[start:end], name)
                at = end
        yield nodes.Text(text[at:])

    def reference(self, words, name):
        return addnodes.pending_xref(
            "",
            nodes.inline(words, words, classes=["std", "std-doc"]),
            refdomain="std",
            reftype="doc",
            reftarget=f"/{name}",
            refexplicit=True,
            refwarn=True,
            refdoc=self.env.docname,
        )


class NoLinkedSpace(SphinxPostTransform):
    """ "Solution to Exercise 3": the space before the link is not part of it."""

    default_priority = 30  # after sphinx-exercise has made the titles

    def run(self):
        for link in list(self.document.findall(nodes.reference)):
            first = next(link.findall(nodes.Text), None)
            if first is not None and first.startswith(" "):
                first.parent.replace(first, nodes.Text(first.lstrip()))
                link.parent.insert(link.parent.index(link), nodes.Text(" "))


def setup(app):
    app.add_transform(Chapters)
    app.add_post_transform(NoLinkedSpace)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
