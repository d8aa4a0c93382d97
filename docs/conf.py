"""Sphinx: the documentation's site, from the Markdown of this folder and the docstrings. `make docs` builds it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path.insert(0, str(REPOSITORY))

project = "torch_attn"
author = "torch_attn developers"
(release,) = re.findall(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.M)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3  # pages link to each other's headings, as on the repository's own pages
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"torch_attn {release}"
html_static_path = ["_static"]
html_css_files = ["formulas.css"]
html_theme_options = {"navigation_with_keys": True}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_rtype = False


def copy_images(app: Sphinx, error: Exception | None) -> None:
    """The pictures, which the pages name in HTML: light and dark ones in one <picture>, which Sphinx does not read."""
    if error is None and app.builder.format == "html":
        shutil.copytree(HERE / "images", Path(app.outdir) / "images", dirs_exist_ok=True)
        for picture in [HERE / "digits_attention.png", *(REPOSITORY / "benchmarks" / "results").glob("*.png")]:
            shutil.copy(picture, app.outdir)


def write_formula(translator: nodes.NodeVisitor, node: nodes.Element) -> None:
    """MathML, which browsers draw themselves: the pages need no script from elsewhere."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("build-finished", copy_images)
