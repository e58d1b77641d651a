"""The website: every link and every image leads somewhere, and no page loads anything from a network."""
import fcntl
import html
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from mkdocs.exceptions import Abort

import api_pages
import docs
from sync import ROOT

TAG = re.compile(r"<([a-z][\w-]*)\b([^>]*)>", re.I)
ATTRIBUTE = re.compile(r"""([\w:-]+)=(?:"([^"]*)"|'([^']*)')""")
LOADS = {"src", "srcset", "poster", "data", "background"}       # attributes that make a browser load
FOREIGN = re.compile(r"\s*(?:[a-z]+:)?//", re.I)
FOREIGN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*(?:https?:)?//", re.I)
MAGIC = {".png": b"\x89PNG", ".jpeg": b"\xff\xd8", ".jpg": b"\xff\xd8", ".svg": b"<", ".gif": b"GIF"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the site, built once, also where several processes of pytest share the tests."
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out, done = base / "site", base / "site.done"
    with open(base / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            docs.build(out, coloured=False)
            done.touch()
    return out


@pytest.fixture(scope="module")
def pages(site):
    "Page -> (tag, attributes) of all that it holds."
    return {p: tags(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}


def tags(text):
    "(tag, attributes) of every tag in a page."
    return [(name.lower(), {k.lower(): html.unescape(a or b) for k, a, b in ATTRIBUTE.findall(rest)})
            for name, rest in TAG.findall(text)]


def values(found, *keys):
    "(tag, value) of the attributes with these names."
    return [(tag, attributes[k]) for tag, attributes in found for k in keys if k in attributes]


def where(page, address):
    "The file that an address on a page leads to."
    path = unquote(urlsplit(address).path)
    return Path(os.path.normpath(page.parent / path)) if path else page


def exported_module(path):
    "The module that a notebook exports, or None."
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells)
    found = re.search(r"(?m)^\s*#\s*\|\s*default_exp\s+([\w.]+)", text)
    return found and f"domainmix.{found[1]}"


def notebooks():
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def page_of(site, path):
    return site / path.relative_to(ROOT).with_suffix(".html")


def api_page(site, module):
    return site / Path(api_pages.page_name(module)).with_suffix(".html")


def test_every_link_leads_to_a_page_and_a_place_on_it(site, pages):
    ids = {page: {v for _, v in values(found, "id", "name")} for page, found in pages.items()}
    broken, followed = [], 0
    for page, found in pages.items():
        for tag, address in values(found, "href"):
            if urlsplit(address).scheme in ("http", "https", "mailto"):
                continue
            followed += 1
            target, anchor = where(page, address), unquote(urlsplit(address).fragment)
            if not target.is_file():
                broken.append(f"{page.relative_to(site)}: no file {address}")
            elif anchor and target in ids and anchor not in ids[target] and not anchor.startswith("__"):
                broken.append(f"{page.relative_to(site)}: no place {address}")
    assert not broken, "\n".join(sorted(set(broken)))
    assert followed > 20 * len(pages)


def test_every_image_is_there(site, pages):
    broken, seen = [], set()
    for page, found in pages.items():
        for tag, address in values([f for f in found if f[0] in ("img", "source", "image")], "src"):
            file = where(page, address)
            data = file.read_bytes()[:4] if file.is_file() and not address.startswith("data:") else b""
            seen.add(file)
            if not address.startswith("data:image/") and not data.startswith(MAGIC.get(file.suffix, b"?")):
                broken.append(f"{page.relative_to(site)}: {address[:100]}")
    assert not broken, "\n".join(broken)
    for path in notebooks():
        cells = [c for c in nbformat.read(path, as_version=4).cells if "hide" not in docs.directives(c.source)]
        outputs = [o for c in cells for o in c.get("outputs", [])]
        images = sum(any(k.startswith("image/") for k in o.get("data", {})) for o in outputs)
        shown = page_of(site, path).read_text(encoding="utf-8").count("<img ")
        assert shown >= images, f"{path.name} has {images} images in its outputs, its page {shown}"
    assert site / "nbs/images/pipeline.png" in seen


def test_no_page_loads_anything_from_a_network(site, pages):
    foreign = []
    for page, found in pages.items():
        loads = values(found, *LOADS)
        loads += values([f for f in found if f[0] in ("link", "use", "image")], "href", "xlink:href")
        foreign += [f"{page.relative_to(site)}: {tag} {address}" for tag, address in loads if FOREIGN.match(address)]
        text = page.read_text(encoding="utf-8")
        styles = "".join(re.findall(r"<style.*?</style>|\bstyle=\"[^\"]*\"", text, re.S))
        foreign += [f"{page.relative_to(site)}: {m[0]}" for m in FOREIGN_STYLE.finditer(styles)]
        # The theme's script would fetch a library for such a diagram, and figures of a repository.
        classes = {word for _, value in values(found, "class") for word in value.split()}
        foreign += [f"{page.relative_to(site)}: {word}" for word in classes & {"mermaid", "md-source"}]
    for style in site.rglob("*.css"):
        foreign += [f"{style.name}: {m[0]}" for m in FOREIGN_STYLE.finditer(style.read_text(encoding="utf-8"))]
    assert not foreign, "\n".join(foreign)


def test_every_notebook_and_every_module_has_a_page_and_they_are_linked(site, pages):
    side_bar = {where(site / "index.html", address) for _, address in values(pages[site / "index.html"], "href")}
    modules = api_pages.package_modules(ROOT)
    assert len(modules) > 30
    wanted = {page_of(site, p) for p in notebooks()} | {api_page(site, m) for m in modules}
    assert not wanted - pages.keys(), "no page"
    assert not wanted - side_bar, "not in the side bar"
    links = {page: {where(page, address) for _, address in values(found, "href")} for page, found in pages.items()}
    for path in notebooks():
        module = exported_module(path)
        if module in modules:
            body = page_of(site, path).read_text(encoding="utf-8").partition("<article")[2]
            assert f">{module}</a>" in body and page_of(site, path) in links[api_page(site, module)], path.name


def test_reference_pages_hold_the_public_names_and_their_docments(site):
    from domainmix import losses
    text = api_page(site, "domainmix.losses").read_text(encoding="utf-8")
    for name in losses.__all__:
        assert f'<h2 id="{name.lower()}"' in text, name
    comment = api_pages.parameter_rows(losses.id_loss)[0][0][3]
    for words in (comment, losses.id_loss.__doc__):
        assert words and html.escape(words, quote=False) in text


def test_the_search_finds_a_notebook(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    assert (site / "search/search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    for path in notebooks():
        page = page_of(site, path).relative_to(site).as_posix()
        found = [d for d in index["docs"] if d["location"].partition("#")[0] == page]
        assert found and html.unescape(found[0]["title"]) == docs.title_of(path).replace("`", ""), page
        opening = nbformat.read(path, as_version=4).cells[0].source
        word = re.findall(r"[A-Za-z]{4,}", re.sub(r"!?\[[^\]]*\]\([^)]*\)|`[^`]*`|\$.*?\$", " ", opening))[-1]
        assert word in " ".join(d["text"] for d in found), (page, word)


def test_formulas_are_mathml_and_directives_are_not_shown(site):
    for path in notebooks():
        text = page_of(site, path).read_text(encoding="utf-8")
        prose = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
        blocks = len(re.findall(r"\$\$.+?\$\$", re.sub(r"```.*?```|`[^`\n]*`", "", prose, flags=re.S), re.S))
        assert text.count('display="block"') >= blocks and 'class="arithmatex"' not in text, path.name
        assert not re.search(r"(?m)^(?:<[^>]+>)*#\s*\|\s*\w", text), path.name


def small_project(folder, readme):
    (folder / "settings.ini").write_text("[DEFAULT]\ntitle = t\ndescription = d\nauthor = a\ncopyright = c\n")
    (folder / "README.md").write_text(readme)
    (folder / "nbs/part").mkdir(parents=True)
    (folder / "nbs/empty").mkdir()
    cells = [nbformat.v4.new_markdown_cell("# One\n\n> Sub\n\nText."), nbformat.v4.new_markdown_cell("## The $x$ Part"),
             nbformat.v4.new_code_cell("#| hide\nsecret = 1"), nbformat.v4.new_code_cell("#| export\nshown = 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "nbs/part/00_one.ipynb")
    return folder


def test_links_between_files_become_links_between_pages(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    small_project(project, "# T")
    (project / "LICENSE").write_text("free")
    source = docs.Source(tmp_path / "source", project)
    for text, wanted in {
        "[a](nbs/part/00_one.ipynb#The-Part,-Eq.-(2)) (b)": "[a](nbs/part/00_one.md#the-part-eq-2) (b)",
        "[`a`](LICENSE) [`b`](nbs/empty)": "[`a`](LICENSE) `b`",
        "`[a](x.ipynb)` [b](https://e.org/x.ipynb)": "`[a](x.ipynb)` [b](https://e.org/x.ipynb)",
    }.items():
        assert source.markdown(text, project / "README.md") == wanted
    assert (tmp_path / "source/LICENSE").read_text() == "free"
    assert docs.sections(source.notebooks, project) == [("Part", source.notebooks)]


@pytest.mark.parametrize("link, fine", [
    ("nbs/part/00_one.ipynb", True), ("nbs/part/00_one.ipynb#nowhere", False), ("nbs/02_two.ipynb", False)])
def test_a_link_to_nothing_stops_the_build(tmp_path, link, fine):
    project, out = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    small_project(project, f"# T\n\n[x]({link})\n")
    if not fine:
        with pytest.raises(Abort):
            docs.build(out, project)
        return
    docs.build(out, project)
    page = (out / "nbs/part/00_one.html").read_text(encoding="utf-8")
    assert "secret" not in page and "shown" in page and "export" not in page
    assert 'href="nbs/part/00_one.html"' in (out / "index.html").read_text(encoding="utf-8")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files"):
        docs.build(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("text, wanted", [
    ("a\n- b\n  - c\n\n  d\n\ne", "a\n\n- b\n    - c\n\n    d\n\ne"),
    ("1. a\n   - b\n2. c", "1. a\n    - b\n2. c"),
    ("- a\n    - b", "- a\n    - b"),
    ("- a\n\n  | x |\n  |---|", "- a\n\n    | x |\n    |---|"),
    ("in\n2019. so", "in\n2019. so"),
    ("- a\n  ```\n  - b\n    c\n  ```", "- a\n    ```\n    - b\n      c\n    ```"),
    ("```\na\n- b\n```", "```\na\n- b\n```")])
def test_lists_are_read_as_in_jupyter(text, wanted):
    assert docs.indent_lists(text) == wanted


def test_parameter_counts_of_other_systems():
    "The table in docs/systems.md, counted."
    import torch
    from domainmix.backbone import build_backbone, n_parameters
    from domainmix.baselines.qaconv import build_matcher
    from domainmix.baselines.translation import PatchDiscriminator, StyleGenerator
    from domainmix.bodies import BackboneConfig
    from domainmix.discriminator import HEADS, Discriminator
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| ([\d,]+) \|([^|]*)\|$", (ROOT / "docs/systems.md").read_text(encoding="utf-8"), re.M)
    def net(name, **settings): return build_backbone(BackboneConfig(name, stripes=1, **settings))
    with torch.device("meta"):
        made = {"SDA, each of two generators": StyleGenerator(), "SDA, each of two discriminators": PatchDiscriminator(),
                "SNR in ResNet-50": net("resnet50", snr=True), "MGN": net("mgn", width=64), "MuDeep": net("mudeep", width=64),
                "MuDeep of 2017": net("mudeep_2017", width=48), "CaNE-Dual": net("cane_dual", width=64), "OSNet-IBN": net("osnet_ibn"),
                "CaNE, head for ten cameras": Discriminator(2048, 10, **HEADS["cane"]), "DualNorm in ResNet-50": net("resnet50_dualnorm", last_stride=2)}
    made |= {f"QAConv {v}": build_matcher(BackboneConfig("resnet50"), 384, 128, v) for v in ("1.0", "2.1")}
    assert {name for name, *_ in rows} == made.keys()
    for name, here, published, why in rows:
        assert f"{n_parameters(made[name]):,}" == here, name
        differ = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}\d", why)]
        assert (here == published) == (not why.strip()), name
        assert not differ or int(here.replace(",", "")) == int(published.replace(",", "")) + (differ[0] if len(differ) == 1 else differ[1] - differ[0]), name
