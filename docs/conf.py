"""The site: sphinx-build -c docs . build/site (make site).

The pages are the Markdown files as they are, at their places in the repository, so that a link works on GitHub and on
the site alike. Warnings, such as of a link to nothing, are errors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

project = "gemma_norm"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
html_title = project
html_theme = "alabaster"
html_theme_options = {"description": "RMSNorm kernels for PyTorch", "page_width": "1100px", "fixed_sidebar": True}
html_sidebars = {"**": ["about.html", "searchbox.html", "navigation.html"]}
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_show_sourcelink = html_show_copyright = False


def targets_in_html(app: Any, document: nodes.document) -> None:
    """Makes a target of each ``<a id="t1">``, of which there is one in each row of docs/tuning-log.md."""
    page = app.env.docname
    slugs = app.env.metadata[page].setdefault("myst_slugs", {})
    for raw in document.findall(nodes.raw):
        for name in re.findall(r'<a id="([^"]+)">', raw.astext()):
            slugs[name] = (raw.line, name, name)


def folders_as_text(app: Any, document: nodes.document) -> None:
    """A link to a folder of the repository is left as text: the site has none of its files."""
    page = Path(app.env.doc2path(app.env.docname))
    for link in list(document.findall(addnodes.pending_xref)):
        if (page.parent / link.get("reftarget", "")).is_dir():
            link.replace_self(link.children)


def setup(app: Any) -> None:
    app.connect("doctree-read", targets_in_html)
    app.connect("doctree-read", folders_as_text)
