"""Settings of the documentation: Sphinx, with Markdown pages (MyST), the furo theme and docstrings (autodoc).

`make docs` builds the site into build/site. Nothing is fetched while it is built or read. Pages that follow from the
code, such as the table of all settings, are written into docs/reference/generated before the build.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

from embedscale import __version__  # noqa: E402

project = "embedscale"
author = copyright = "the embedscale authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_argparse_cli"]
exclude_patterns = ["reference/generated", "schemas"]
nb_execution_mode = "off"  # the notebook holds its outputs; `make notebook` runs it again, a test runs its cells
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"embedscale {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}
pygments_style, pygments_dark_style = "friendly", "monokai"


def setup(app):
    """Write the generated pages before Sphinx reads the sources."""
    app.connect("builder-inited", lambda app: generate.write_all(HERE / "reference" / "generated"))
