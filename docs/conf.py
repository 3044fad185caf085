"""The documentation site: `python -m sphinx -W --keep-going docs build/site`.

Nothing is downloaded, neither when it is built nor when it is read.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "site")]

project = "pyro_bmr"
release = re.findall(
    r'^__version__ = "(.+)"',
    (DOCS.parent / "pyro_bmr" / "__init__.py").read_text(encoding="utf-8"),
    flags=re.M,
)[0]
html_title = f"pyro_bmr {release}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "assets",
    "docstrings",
    "equations",
    "gallery",
    "links",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".py": "gallery"}
exclude_patterns = ["conf.py", "site"]

default_role = "code"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6

html_theme = "furo"
html_static_path = ["site/static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}
