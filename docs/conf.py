"""Sphinx settings of the site. docs/build.py collects the sources and calls Sphinx."""
import configparser
from pathlib import Path

from latex2mathml.converter import convert as mathml

settings = configparser.ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf8")

project = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
version = release = settings["DEFAULT"]["version"]
html_title = project
smartquotes = False  # "cpu" is a value

extensions = ["myst_nb"]
exclude_patterns = ["jupyter_execute", "**.ipynb_checkpoints"]
nb_execution_mode = "off"  # the outputs are those the notebooks carry
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # a widget's live view: its text is shown instead
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "use_download_button": False,
    "use_repository_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "extra_footer": "",
}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False


def _visit(block):
    "Formulas as MathML, which browsers draw by themselves: no script, no network."

    def visit(writer, node):
        display = "block" if block else "inline"
        formula = mathml(node.astext(), display=display)
        writer.body.append(f'<div class="math">{formula}</div>' if block else f'<span class="math">{formula}</span>')
        from docutils.nodes import SkipNode

        raise SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=_visit(False), block_renderers=_visit(True))
    app.config.html_math_renderer = "mathml"
