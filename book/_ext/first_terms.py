"""Link the first use of a glossary term in each chapter to its entry.

The notebooks need no markup for it, so in JupyterLab their text stays plain. Only running text
counts: no code, no heading, no formula, no table, no exercise. Words that also have an
everyday meaning are left out.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

EVERYDAY = {
    *("anchor", "clip", "group", "held out", "mask", "power", "record", "replay"),
    *("scale", "score", "seed", "stage", "working"),
}
RUNNING = (nodes.section, nodes.bullet_list, nodes.enumerated_list, nodes.list_item)


def terms(glossary):
    """The entries of glossary.md: the lines of the directive that are not indented."""
    body = glossary.partition("{glossary}\n")[2].partition("\n```")[0]
    return [line.strip() for line in body.splitlines() if line.strip() and line[0] != " "]


def pattern(words):
    """Any of the words, whole, in the plural too; the longest first."""
    names = sorted(set(words) - EVERYDAY, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(s?)(?![\w-])", re.I)


def is_running_text(paragraph):
    above = paragraph.parent
    while isinstance(above, RUNNING):
        above = above.parent
    return isinstance(above, nodes.document)


def is_use(found, entry):
    """`lora` is no use of `LoRA`; `Token` at the start of a sentence is one of `token`."""
    return found == entry or (entry.islower() and found.lower() == entry)


class FirstTerms(SphinxTransform):
    default_priority = 790  # the text is complete, references are not yet resolved

    def apply(self):
        if not self.env.docname.startswith("notebooks/"):
            return
        glossary = self.env.srcdir / "book" / "glossary.md"
        if not glossary.exists():
            return
        self.env.note_dependency(str(glossary))
        entries = {name.lower(): name for name in terms(glossary.read_text())}
        any_term = pattern(entries.values())
        for paragraph in list(self.document.findall(nodes.paragraph)):
            if is_running_text(paragraph):
                for text in [node for node in paragraph.children if isinstance(node, nodes.Text)]:
                    self.link(text, any_term, entries)

    def link(self, text, any_term, entries):
        """Replace a text by itself with links in it; take from `entries` what was linked."""
        pieces, at = [], 0
        for match in any_term.finditer(text):
            entry = entries.get(match[1].lower())
            if entry and is_use(match[1], entry):
                del entries[entry.lower()]
                pieces += [nodes.Text(text[at : match.start()]), self.reference(match[0], entry)]
                at = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[at:])])

    def reference(self, words, entry):
        return addnodes.pending_xref(
            "",
            nodes.inline(words, words, classes=["std", "std-term", "first-use"]),
            refdomain="std",
            reftype="term",
            reftarget=entry,
            refexplicit=True,
            refwarn=True,
            refdoc=self.env.docname,
        )


def setup(app):
    app.add_transform(FirstTerms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
