"""The website: the saved notebooks, the documents, and a reference page for each module. `make docs` runs this.

MkDocs with the theme Material builds the pages. This file only puts their source together, as Markdown in a temporary
folder with the layout of the repository, so that links between files hold. Nothing is executed or fetched.
"""
import configparser
import copy
import functools
import html
import importlib
import itertools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import nbformat
from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config
from nbconvert import MarkdownExporter
from pymdownx.slugs import slugify

import api_pages
from sync import ROOT

OUT = ROOT / "_docs"
SITE = Path(__file__).parent / "site"
SECTIONS = {  # folder in nbs/, or first digit of a notebook there -> heading in the side bar, in reading order
    "9": "Companions",
    "0": "Foundations",
    "1": "Data",
    "2": "Networks and losses",
    "3": "Pseudo labels",
    "4": "Training",
    "baselines": "Baselines",
    "5": "Evaluation",
    "runs": "Runs",
    "6": "Inference and deployment",
    "views": "Figures, tables, reports",
    "bench": "Benchmarks",
    "7": "Command line",
    "8": "Command line",
}
DOCUMENTS = ("*.md", "docs/**/*.md", "data/*.md", "benchmarks/*.md")
CODE = re.compile(r"(^ *```.*?^ *```[^\n]*$|^ *~~~.*?^ *~~~[^\n]*$|`+[^`\n]+`+)", re.S | re.M)
PLAIN_FENCE = re.compile(r"\A( *```|~~~) *\n")
ADDRESS = r"([^()\s\"]+(?:\([^()\s\"]*\)[^()\s\"]*)*)"
LINK = re.compile(r"(\]\(|\b(?:href|src)=\")" + ADDRESS)
FORMULA = re.compile(r"( *)(\$\$.+?\$\$) *", re.S)
LINKED = re.compile(r"\[((?:`[^`]*`|[^\]`])*)\]\(" + ADDRESS + r"\)")
ITEM = re.compile(r"([-*+]|\d+[.)]) +")
to_slug = slugify(case="lower")


def change_prose(text, change):
    "`text` with `change` made to all that is not code. Code without a language is marked as commands."
    pieces = enumerate(CODE.split(text))
    return "".join(PLAIN_FENCE.sub(r"\1console\n", p, count=1) if i % 2 else change(p) for i, p in pieces)


def indent_lists(text):
    "Lists as GitHub and Jupyter read them -> lists as MkDocs reads them: after an empty line, indented by four spaces."
    lines, levels, fenced = [], [], False   # levels: column where the text of each open list item begins
    for line in text.splitlines():
        body = line.lstrip()
        indent, goes_on = len(line) - len(body), bool(lines and lines[-1].strip())
        item = None if fenced else ITEM.match(body)
        if item and goes_on and not levels:
            item = item if item[1] in "-*+1." else None   # no other number begins a list inside a paragraph
            lines += [""] if item else []
        if body and not fenced and (item or not goes_on):
            levels = [column for column in levels if column <= indent]
        if body and levels and indent >= levels[-1]:
            line = " " * (4 * len(levels) + (0 if item else indent - levels[-1])) + body
        if item:
            levels.append(indent + len(item[0]))
        fenced ^= body.startswith(("```", "~~~"))
        lines.append(line)
    return "\n".join(lines)


def directives(source):
    "The words after `#|` in the first lines of a cell."
    first = itertools.takewhile(lambda line: not line.strip() or re.match(r"\s*#\s*\|", line), source.splitlines())
    return {word for line in first for word in re.findall(r"\|\s*(\w+)", line)[:1]}


class Source:
    "The folder that MkDocs builds the site from, while it is put together."

    def __init__(self, folder, root=ROOT):
        self.folder, self.root = folder, root
        self.notebooks = sorted((root / "nbs").rglob("*.ipynb"))
        self.notebooks = [p for p in self.notebooks if ".ipynb_checkpoints" not in p.parts]
        self.documents = [p for pattern in DOCUMENTS for p in sorted(root.glob(pattern))]
        self.pages = {p: self.page_of(p) for p in self.notebooks + self.documents}
        self.modules = api_pages.package_modules(root)
        self.exporter = MarkdownExporter(optimistic_validation=True)   # a notebook is looked over once, not at each step
        self.notebook_of = {}   # module -> notebook

    def page_of(self, path):
        "Path of a file's page in the site's source. MkDocs makes README.md the index of its folder."
        return PurePosixPath(path.relative_to(self.root).with_suffix(".md").as_posix())

    def write(self, page, text):
        target = self.folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def link(self, url, where):
        "A link of the file `where`, for the site's source. None: a folder without a page. Other files are copied."
        name, mark, anchor = url.partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:|//|/", url):
            return url
        anchor = mark + to_slug(unquote(anchor), "-") if mark else ""
        target = Path(os.path.normpath(where.parent / unquote(name))) if name else where
        if target.is_dir():
            target = next((target / n for n in ("README.md", "index.ipynb") if (target / n) in self.pages), target)
        if target in self.pages:
            here = self.pages[where].parent
            return (os.path.relpath(self.pages[target], here) if name else "") + anchor
        if target.is_dir():
            return None
        if target.is_file() and target.is_relative_to(self.root):
            copy = self.folder / target.relative_to(self.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, copy)
        return url

    def markdown(self, text, where):
        "The Markdown of the file `where`, for its page."
        text = LINKED.sub(lambda m: m[1] if self.link(m[2], where) is None else m[0], indent_lists(text))

        def change(part):
            part = FORMULA.sub(r"\n\n\1\2\n\n", part)   # only between empty lines is a formula displayed
            return LINK.sub(lambda m: m[1] + (self.link(m[2], where) or m[2]), part)

        return change_prose(text, change)

    def notebook_cells(self, path, cells):
        "The cells that are shown, without their directives. Before each exported cell comes a place to link to."
        for cell in cells:
            found = directives(cell.source)
            if found & {"export", "exports", "exporti"}:
                yield nbformat.v4.new_markdown_cell(f'<div id="cell-{cell.id}"></div>')
            if found & {"hide", "default_exp"} or not cell.source.strip():
                continue
            if cell.cell_type == "markdown":
                cell.source = self.markdown(cell.source, path)
            else:
                cell.source = re.sub(r"(?m)^\s*#\s*\|.*\n?", "", cell.source)
            yield cell

    def module_of(self, cells):
        "The module that a notebook exports, or None."
        for cell in cells:
            found = re.match(r"\s*#\s*\|\s*default_exp\s+([\w.]+)", cell.source)
            if found and f"domainmix.{found[1]}" in self.modules:
                return f"domainmix.{found[1]}"

    def add_notebook(self, path):
        "Write the page of a notebook and the images of its outputs."
        nb = copy.deepcopy(read_notebook(path))
        module = self.module_of(nb.cells)
        cells = list(self.notebook_cells(path, nb.cells))
        if module:
            self.notebook_of[module] = path
            link = os.path.relpath(api_pages.page_name(module), self.pages[path].parent)
            cells.insert(1, nbformat.v4.new_markdown_cell(f"Reference of the module: [{module}]({link})."))
        nb.cells = cells
        nb.metadata["language_info"] = {"name": "python"}
        resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        text, resources = self.exporter.from_notebook_node(nb, resources)
        self.write(self.pages[path], re.sub(r"!\[(?:png|jpeg|svg)\]\(", "![Output of the cell above](", text))
        for name, data in resources["outputs"].items():
            image = self.folder / self.pages[path].parent / name
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(data)

    def add_module(self, module, path):
        "Write the reference page of a module."
        page, notebook = api_pages.page_name(module), self.notebook_of.get(module)
        link = os.path.relpath(self.pages[notebook], page.parent) if notebook else None
        self.write(page, api_pages.module_page(module, path, link, notebook and title_of(notebook)))

    def add_reference(self):
        "Write the reference: a page for each module, and the list of them."
        rows = ["# API", "", *self.offered(), "| module | what it holds |", "| --- | --- |"]
        for module, path in self.modules.items():
            self.add_module(module, path)
            about = subtitle_of(self.notebook_of[module]) if module in self.notebook_of else ""
            page = os.path.relpath(api_pages.page_name(module), "api")
            rows.append(f"| [{module}]({page}) | {about} |")
        self.write("api/index.md", "\n".join(rows) + "\n")

    def offered(self):
        "A line on the names that `import domainmix` offers, where it has such a list."
        package = importlib.import_module("domainmix")
        found = {n: getattr(getattr(package, n), "__module__", None) for n in getattr(package, "__all__", [])}
        pages = {n: os.path.relpath(api_pages.page_name(m), "api") for n, m in found.items() if m in self.modules}
        links = [f"[`{n}`]({page}#{to_slug(n, '-')})" for n, page in pages.items()]
        return [f"`import domainmix` offers {', '.join(links)}.", ""] if links else []

    def navigation(self):
        "The side bar: documents, notebooks by section, reference, notes of the project."
        start = [p for p in self.documents if p == self.root / "README.md"]
        guides = [p for p in self.documents if p.is_relative_to(self.root / "docs")]
        notes = [p for p in self.documents if p not in start + guides]
        index = [p for p in self.notebooks if p == self.root / "nbs" / "index.ipynb"]
        bar = [{"Start": str(self.pages[p])} for p in start]
        bar += [{"Map of the notebooks": str(self.pages[p])} for p in index] + self.entries(guides)
        for heading, books in sections(self.notebooks, self.root):
            bar.append({heading: self.entries(books)})
        modules = [{m.partition(".")[2]: str(api_pages.page_name(m))} for m in self.modules]
        return [*bar, {"API": ["api/index.md", *modules]}, {"Project": self.entries(notes)}]

    def entries(self, paths):
        return [{title_of(p): str(self.pages[p])} for p in paths]

    def assemble(self):
        "Write all of it."
        for path in self.documents:
            self.write(self.pages[path], self.markdown(path.read_text(encoding="utf-8"), path))
        for path in self.notebooks:
            self.add_notebook(path)
        self.add_reference()
        shutil.copytree(SITE, self.folder / "assets", ignore=shutil.ignore_patterns("*.yml", "*.py", "__pycache__"))


@functools.cache
def read_notebook(path):
    return nbformat.read(path, as_version=4)


@functools.cache
def first_lines(path):
    "The lines of a document, or of a notebook's first cell."
    if path.suffix == ".ipynb":
        return read_notebook(path).cells[0].source.splitlines()
    return path.read_text(encoding="utf-8").splitlines()


def title_of(path):
    return next((line.lstrip("# ").strip() for line in first_lines(path) if line.startswith("# ")), path.stem)


def subtitle_of(path):
    found = next((line for line in first_lines(path) if line.startswith(">")), "")
    return html.escape(found.lstrip("> ").strip(), quote=False)


def sections(notebooks, root=ROOT):
    "(heading, notebooks) in reading order. A folder that SECTIONS does not know comes last, under its own name."
    found = {heading: [] for heading in SECTIONS.values()}
    for path in notebooks:
        folder = path.parent.relative_to(root / "nbs").as_posix()
        if folder == "." and path.stem == "index":
            continue
        key = path.name[0] if folder == "." else folder
        found.setdefault(SECTIONS.get(key, folder.capitalize() if folder != "." else "More"), []).append(path)
    return [(heading, books) for heading, books in found.items() if books]


def build(out=OUT, root=ROOT, coloured=True):
    "Build the site in the folder `out`; return the number of its pages. Without coloured code it takes less time."
    if out.exists() and any(out.iterdir()) and not (out / "search" / "search_index.json").exists():
        raise SystemExit(f"{out} holds other files, which would be lost: give an empty folder")
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    about = ini["DEFAULT"]
    with tempfile.TemporaryDirectory() as folder:
        source = Source(Path(folder), root)
        source.assemble()
        config = load_config(
            str(SITE / "mkdocs.yml"), docs_dir=folder, site_dir=str(out), nav=source.navigation(),
            site_name=about["title"], site_description=about["description"], site_author=about["author"],
            copyright=about["copyright"])
        config["mdx_configs"]["pymdownx.highlight"]["use_pygments"] = coloured
        build_site(config)
    (out / "404.html").unlink(missing_ok=True)   # its links start at the root of a web server
    return len(list(out.rglob("*.html")))


if __name__ == "__main__":
    target = Path(sys.argv[1] if sys.argv[1:] else OUT)
    print(f"{build(target)} pages: {target / 'index.html'}")
