"""Sphinx settings: `sphinx-build -W -b html docs docs/_build`."""

import importlib.metadata
import re

project = "mlssl"
author = "the mlssl authors"
release = importlib.metadata.version("mlssl")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme = "furo"
html_title = f"mlssl {release}"

default_role = "code"  # docstrings write names between single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("npt.ArrayLike", "ImageArray", "Decode", "Positives", "Pooling")}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_use_ivar = True


def setup(app):
    """Tidy what autodoc makes of the docstrings."""
    app.connect("autodoc-skip-member", _leave_out_constants)
    app.connect("autodoc-process-signature", _name_aliases)


def _leave_out_constants(_app, what, _name, member, skip, _options):
    # Constants: napoleon takes a colon in their docstrings for one behind a type.
    return skip or (what in ("module", "data") and not callable(member))


def _name_aliases(_app, _what, _name, _object, _options, arguments, returns):
    # Sphinx spells an alias in a union out as the object that stands for it.
    plain = [text and re.sub(r"TypeAliasForwardRef\('(?:npt\.)?(\w+)'\)", r"\1", text) for text in (arguments, returns)]
    return tuple(plain)
