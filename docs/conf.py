"""Sphinx settings: `sphinx-build -W -b html docs docs/_build`."""

import importlib.metadata
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "mlssl"
author = "the mlssl authors"
release = importlib.metadata.version("mlssl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_show_copyright = False
html_title = f"mlssl {release}"
html_math_renderer = "mathml"  # which browsers draw themselves; MathJax would come from a network

default_role = "code"  # docstrings write names between single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("npt.ArrayLike", "ImageArray", "Decode", "Positives", "Pooling")}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_use_ivar = True


def setup(app):
    """Tidy what autodoc makes of the docstrings, and write formulas as MathML."""
    app.connect("autodoc-skip-member", _leave_out_constants)
    app.connect("autodoc-process-signature", _name_aliases)
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_formula, None))
    app.connect("html-page-context", _keep_options_whole)


def _keep_options_whole(_app, _page, _template, context, _doctree):
    # A browser may end a line behind any hyphen, of which an option has two.
    def wrapped(block):
        return re.sub(r"(?<=[ \n>])(--[\w.-]+)", r'<span class="option">\1</span>', block[0])

    if "body" in context:
        blocks = r'<div class="highlight-bash.*?</pre>'
        context["body"] = re.sub(blocks, wrapped, context["body"], flags=re.DOTALL)


def _inline_formula(writer, node):
    _write_formula(writer, node, "inline")


def _formula(writer, node):
    _write_formula(writer, node, "block")


def _write_formula(writer, node, display):
    writer.body.append(convert(node.astext(), display=display))
    raise SkipNode


def _leave_out_constants(_app, what, _name, member, skip, _options):
    # Constants: napoleon takes a colon in their docstrings for one behind a type.
    return skip or (what in ("module", "data") and not callable(member))


def _name_aliases(_app, _what, _name, _object, _options, arguments, returns):
    # Sphinx spells an alias in a union out as the object that stands for it.
    plain = [text and re.sub(r"TypeAliasForwardRef\('(?:npt\.)?(\w+)'\)", r"\1", text) for text in (arguments, returns)]
    return tuple(plain)
