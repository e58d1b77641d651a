"""The documentation: every notebook as a page, and an index that leads from the paper to them. `make docs` runs this.

All is made from the notebooks as they are saved, nothing is executed and nothing is fetched: formulas become MathML, which browsers
draw by themselves, and each page has its style and its pictures inside.
"""
import html
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from domainmix.views.report import mathml
from sync import ROOT, notebooks

OUT = ROOT / "_docs"
PARTS = {  # first number of a notebook's name -> heading of its part of the index
    0: "Foundations", 10: "Data: the world, the readers, the batches", 19: "Networks and losses, Sec. 3.2 and Fig. 5", 29: "Pseudo labels: stage 1, Sec. 3.2.1",
    40: "Training: stages 2 and 3, Sec. 3.2.2 and 3.2.3", 50: "Evaluation, Sec. 4.1", 51: "Runs, tables, figures, command line", 90: "To work in: the method, its noise, its gap",
}
STYLE = """
body{margin:0;font:16px/1.6 system-ui,sans-serif;color:#24292f;background:#fff} main{max-width:60rem;margin:auto;padding:1rem 1.5rem 4rem}
nav{max-width:60rem;margin:auto;padding:1rem 1.5rem 0;font-size:.9rem;display:flex;gap:1.5rem} a{color:#0969da;text-decoration:none} a:hover{text-decoration:underline}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;padding:.7rem 1rem;border-radius:6px;margin:.4rem 0} .jp-InputArea pre,.highlight{background:#f6f8fa;border-radius:6px}
code{font:.88em ui-monospace,Menlo,Consolas,monospace} p code,li code,td code{background:#f6f8fa;padding:.1em .3em;border-radius:4px}
blockquote{margin:0 0 1.2rem;padding:.1rem 1rem;border-left:4px solid #d0d7de;color:#57606a} img{max-width:100%} table{border-collapse:collapse;display:block;overflow-x:auto} td,th{border-bottom:1px solid #d0d7de;padding:.25rem .7rem;text-align:left}
math[display=block]{margin:1rem 0} .prompt,.jp-InputPrompt,.jp-OutputPrompt,.anchor-link{display:none} h1{margin-top:.6rem}
"""


def heading(nb):
    "Title and subtitle of a notebook."
    first = nb["cells"][0]["source"].splitlines()
    return first[0].lstrip("# "), next((line.lstrip("> ") for line in first if line.startswith(">")), "")


def visible(cell):
    "Is the cell to be read? Hidden ones only serve the tests."
    return bool(cell["source"].strip()) and not re.match(r"\s*#\s*\|\s*(hide|default_exp)\b", cell["source"])


def link(match):
    return f"]({match[1]}.html{match[2] or ''})"


def page(title, body, before="", after=""):
    near = f'<nav><a href="index.html">domainmix</a>{before}{after}</nav>'
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}{pygments_style()}</style></head><body>{near}<main>{body}</main></body></html>\n")


def pygments_style():
    from pygments.formatters import HtmlFormatter
    return HtmlFormatter(style="friendly", nobackground=True).get_style_defs(".highlight")


def convert_notebook(path):
    "Title, subtitle and body of a notebook's page."
    nb = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    title, subtitle = heading(nb)
    nb["cells"] = [c for c in nb["cells"] if visible(c)]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = re.sub(r"\]\((\w+)\.ipynb(#[\w-]*)?\)", link, mathml(cell["source"]))
        else:
            cell["source"] = re.sub(r"(?m)^\s*#\s*\|.*\n", "", cell["source"])
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(nb)
    return title, subtitle, body


def build(out=OUT):
    "Write the site; give the number of its pages."
    out.mkdir(exist_ok=True)
    books = notebooks()
    made = {b.stem: convert_notebook(b) for b in books}
    names, index, part = list(made), [], None
    for i, (name, (title, subtitle, body)) in enumerate(made.items()):
        near = [f'<a href="{names[j]}.html">{arrow} {html.escape(made[names[j]][0])}</a>' if 0 <= j < len(names) else "" for j, arrow in ((i - 1, "&larr;"), (i + 1, "&rarr;"))]
        (out / f"{name}.html").write_text(page(title, body, *near), encoding="utf-8")
        here = max(k for k in PARTS if k <= int(name[:2]))
        if here != part:
            part = here
            index.append(f"<h2>{html.escape(PARTS[here])}</h2>")
        index.append(f'<p><a href="{name}.html"><b>{html.escape(title)}</b></a><br>{html.escape(subtitle)}</p>')
    (out / "index.html").write_text(page("domainmix", "<h1>domainmix</h1><p>A person re-identification model for cameras it has never seen, "
                                         "trained without a single human label. Each page is a notebook, and each notebook a module.</p>" + "".join(index)), encoding="utf-8")
    return len(made) + 1


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]) if sys.argv[1:] else OUT)} pages: {OUT / 'index.html' if not sys.argv[1:] else sys.argv[1]}")
