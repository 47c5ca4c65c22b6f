"""Fold the code that only draws, so that a chapter reads as text, results and pictures.

The notebooks stay as they are: in JupyterLab, and in the notebook that the page offers for
download, every line is in sight. A cell that its author tagged is left alone.
"""

import ast
import json

DRAWING = {"ax", "axes", "fig", "figure", "new_figure", "tidy", "show", "explore"}
SHORTEST = 8  # lines; what is shorter is quickly passed over
SHARE = 0.6  # of the lines below the imports


def only_draws(source):
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic, a shell command
        return False
    drawing = lines = 0
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        length = statement.end_lineno - statement.lineno + 1
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        lines += length
        drawing += length if names & DRAWING else 0
    return drawing >= SHORTEST and drawing >= SHARE * lines


def fold(app, docname, content):
    if not app.env.doc2path(docname).endswith(".ipynb"):
        return
    notebook = json.loads(content[0])
    for cell in notebook["cells"]:
        tags = cell["metadata"].setdefault("tags", [])
        if cell["cell_type"] == "code" and not tags and only_draws("".join(cell["source"])):
            tags.append("hide-input")
    content[0] = json.dumps(notebook)


def setup(app):
    app.connect("source-read", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
