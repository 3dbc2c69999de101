"""Settings of the documentation site (docs/build.py lays out its pages). No page asks a network for anything."""

import inspect
import re
from pathlib import Path

from latex2mathml.converter import convert
from sphinx.application import Sphinx

import qwen2vl_sft

project = "qwen2vl-sft"
author = "qwen2vl-sft contributors"
release = qwen2vl_sft.__version__
root_doc = "index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]

nb_execution_mode = "off"  # committed outputs are shown as they are
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "strikethrough"]
myst_dmath_allow_labels = False
suppress_warnings = ["myst.strikethrough", "mystnb.unknown_mime_type", "ref.python"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 90
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries = False  # an API page starts with a table of its own; the side bar would be copied into every page
default_role = "code"
smartquotes = False  # `--retry` has two hyphens

html_theme = "furo"
html_title = "qwen2vl-sft"
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "
pygments_style = "friendly"
pygments_dark_style = "monokai"


def restructured(text: str) -> str:
    "A docstring's Markdown as reStructuredText: code stays, everything else is literal text."
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"([\\*|_`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"\\ `{part}`\\ " for part in parts[1::2]]  # double backticks: as it stands, also beside letters
    return "".join(parts)


def describe(app: Sphinx, kind: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    "Add what stands beside the parameters and fields in the source: comments, and the descriptions of settings."
    if kind == "module" or not (getattr(obj, "__module__", None) or "").startswith("qwen2vl_sft"):
        lines.clear()  # a module's docstring is the page's first line already; others' docstrings are written in others' markup
        return
    lines[:] = restructured("\n".join(lines)).split("\n")
    if kind in ("function", "method"):
        lines += parameters(obj)
    elif kind in ("class", "exception") and hasattr(obj, "model_fields"):
        lines += ["", *[f":param {name}: {restructured(field.description)}" for name, field in obj.model_fields.items() if field.description]]
    elif kind == "class":
        lines += parameters(obj)


def parameters(obj: object) -> list[str]:
    "`:param:` lines from the comments beside a function's parameters or a dataclass's fields."
    from fastcore.docments import docments

    try:
        found = docments(obj, full=True, returns=True)
    except Exception:  # no source, as of a generated method
        return []
    lines = []
    for name, one in found.items():
        if (comment := one.get("docment")) and comment is not inspect.Parameter.empty:
            lines.append(f":returns: {restructured(comment)}" if name == "return" else f":param {name}: {restructured(comment)}")
    return ["", *lines] if lines else []


def visit_math(writer, node) -> None:
    "Formulas as MathML, which browsers draw by themselves."
    from docutils import nodes

    is_block = node.tagname == "math_block"
    writer.body.append(convert(node.astext(), display="block" if is_block else "inline"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", describe)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
