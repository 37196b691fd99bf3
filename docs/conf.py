"""Sphinx configuration. Build with ``make docs``: warnings are errors, and nothing is downloaded."""

import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import lightning_stosign  # noqa: E402

project = "lightning-stosign"
author = "The lightning-stosign authors"
copyright = author
version = release = lightning_stosign.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "inventories", "sg_execution_times.rst", "gallery_header.rst"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings give types, ranges and units
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = "lightning-stosign"
html_static_path: list[str] = []
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
}

# The examples take minutes each: they are shown, not run, when the docs are built.
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery"],
    "plot_gallery": False,
    "ignore_pattern": r"(__init__|gpt|small_gpt|text_data|pretrain_gpt|demo)\.py",
    "download_all_examples": False,
    "show_memory": False,
}

# Links to other projects' documentation, from names kept in this repository: the build needs no network.
_PROJECTS = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "torchmetrics": "https://lightning.ai/docs/torchmetrics/stable/",
}


def _inventory(name: str) -> str:
    """Write the objects.inv of a project from its list of names, and return the file's path."""
    lines = (HERE / "inventories" / f"{name}.txt").read_text().splitlines()
    target = HERE / "_build" / f"{name}.inv"
    target.parent.mkdir(exist_ok=True)
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: stable\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    target.write_bytes(head.encode() + zlib.compress("".join(f"{line} -\n" for line in lines).encode()))
    return str(target)


intersphinx_mapping = {name: (url, _inventory(name)) for name, url in _PROJECTS.items()}
