"""Where this copy of the book is published, from the environment; fixes of the theme.

A course that publishes its own copy sets these instead of editing `_config.yml`:

- BOOK_REPOSITORY: the repository that Binder, Colab and JupyterHub open
- BOOK_JUPYTERHUB: a hub with nbgitpuller; without it there is no JupyterHub button
- BOOK_URL: where the pages will be, for the cards that other sites show
"""

import os
import re
from urllib.parse import quote, unquote

WEB_ADDRESS = re.compile(r"https://[\w.-]+(:\d+)?(/[\w./~-]*)?")


def address(name):
    value = os.environ.get(name, "").strip().rstrip("/")
    if value and not WEB_ADDRESS.fullmatch(value):
        raise SystemExit(f"{name} is {value!r}; give a web address that begins with https://")
    return value


def configure(app, config):
    theme = config.html_theme_options
    if repository := address("BOOK_REPOSITORY"):
        theme["repository_url"] = repository
        if not repository.startswith("https://github.com/"):
            theme["repository_provider"] = "gitlab"  # any other host: the address as it is
            theme["launch_buttons"].pop("colab_url", None)  # Colab opens GitHub alone
    if hub := address("BOOK_JUPYTERHUB"):
        theme["launch_buttons"]["jupyterhub_url"] = hub
    if url := address("BOOK_URL"):
        config.ogp_site_url = url
        config.html_baseurl = url


def quote_for_binder(app, pagename, templatename, context, doctree):
    """Binder's form for any Git host wants the repository's slashes quoted too."""
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            start, form, rest = button.get("url", "").partition("/v2/git/")
            if form:
                repository, branch = rest.split("?")[0].rsplit("/", 1)
                place = rest.partition("?")[2]
                button["url"] = f"{start}{form}{quote(unquote(repository), '')}/{branch}?{place}"


def leave_thebe_out(app, pagename, templatename, context, doctree):
    """No page uses Thebe, yet its scripts come, twice, which is an error in the console."""
    context["script_files"] = [
        script for script in context.get("script_files", []) if "thebe" not in words(script)
    ]


def plain_citations(app, pagename, templatename, context, doctree):
    """docutils calls a block of citations a list, whose entries are not what a list may hold."""
    if body := context.get("body"):
        context["body"] = body.replace(' role="list"', "")


def leave_tuple_fields_out(app, what, name, obj, skip, options):
    """A named tuple's fields say only their number."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


NOT_FOUND = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>No such page</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1.1rem/1.5 sans-serif; margin: 3rem }}
</style>
</head>
<body><main><article>
<h1>No such page</h1>
<p>The book has no page at this address; it may have got another name.</p>
<p><a href="{0}/index.html">Contents</a> · <a href="{0}/search.html">Search</a></p>
</article></main></body>
</html>
"""


def write_not_found(app, exception):
    """What GitHub Pages shows at an address that is no page: at any depth, so without assets."""
    if exception is None and app.builder.format == "html":
        page = NOT_FOUND.format(app.config.html_baseurl or ".")
        (app.outdir / "404.html").write_text(page, encoding="utf-8")


def words(script):
    name = getattr(script, "filename", None) or str(script)
    return f"{name} {getattr(script, 'attributes', {}).get('body', '')}".lower()


def setup(app):
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", quote_for_binder, priority=900)
    app.connect("html-page-context", leave_thebe_out, priority=900)
    app.connect("html-page-context", plain_citations)
    app.connect("build-finished", write_not_found)
    app.connect("autodoc-skip-member", leave_tuple_fields_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
