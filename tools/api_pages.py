"""The reference pages: one for each module, from the signatures, docstrings and docments of its public names."""
import ast
import functools
import importlib
import inspect
import re
import textwrap
from dataclasses import dataclass, is_dataclass
from pathlib import PurePosixPath

from fastcore import docments as fastcore_docments
from fastcore.docments import docments

EMPTY = inspect.Parameter.empty
LONGEST_DEFAULT = 60    # characters of a default value in a table
LONGEST_CONSTANT = 30   # lines of a constant's source


@dataclass
class Definition:
    "Where a public name is defined."
    source: str
    cell: str   # id of the cell in the notebook


def target_names(node):
    "The names that a top-level statement defines."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def definitions(text):
    "Public name -> Definition, from the text of an exported module. nbdev marks the start of each cell with its id."
    lines, cells, found = text.splitlines(), {}, {}
    for number, line in enumerate(lines, 1):
        marker = re.match(r"# %% \S+ #(\w+)", line)
        if marker:
            cells[number] = marker[1]
    for node in ast.parse(text).body:
        cell = next((cells[n] for n in sorted(cells, reverse=True) if n < node.lineno), "")
        for name in target_names(node):
            found[name] = Definition("\n".join(lines[node.lineno - 1:node.end_lineno]), cell)
    return found


def code(text):
    "A code span that may stand in a table."
    text = " ".join(str(text).split())
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text else ""


def shorten(text):
    return text if len(text) <= LONGEST_DEFAULT else text[:LONGEST_DEFAULT - 1] + "…"


def type_text(annotation):
    "A type as it reads in the source: without the modules before class names."
    if annotation in (EMPTY, None):
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text)


def default_text(value):
    if value is EMPTY:
        return ""
    if repr(value) == "<factory>":   # a dataclass makes a new object for each instance
        return "..."
    text = getattr(value, "__name__", None) or repr(value)
    return shorten(re.sub(r" at 0x\w+", "", text))


def prose(text):
    "A comment as the text of a table's cell or of a paragraph: `<` and `|` stand for themselves."
    pieces = re.split(r"(`[^`]*`)", " ".join((text or "").split()))
    return "".join(p if i % 2 else p.replace("<", "&lt;").replace("|", "&#124;") for i, p in enumerate(pieces))


def field_rows(source):
    "(name, type, default, comment) of the annotated fields of a class."
    lines, rows = source.splitlines(), []
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            comment = lines[node.end_lineno - 1].partition("#")[2].strip()
            default = ast.unparse(node.value) if node.value else ""
            rows.append((node.target.id, ast.unparse(node.annotation), shorten(default), comment))
    return rows


# docments asks for the source of the same object more than once, and Python parses a whole module to find a class.
fastcore_docments.getsource = functools.cache(inspect.getsource)
comments = functools.cache(docments)


def inherited_comment(cls, name):
    "The comment of a dataclass's field, where a class above it has one."
    above = [b for b in getattr(cls, "__mro__", ())[1:] if is_dataclass(b)]
    return next((c for c in (comments(b).get(name) for b in above) if c), None)


def parameter_rows(obj):
    "(name, type, default, comment) of the parameters, and of what is returned."
    try:
        found = docments(obj, full=True)
    except (TypeError, ValueError, OSError, SyntaxError):
        return [], None
    returned = found.pop("return", None)
    stars = {n: "*" * str(p).count("*", 0, 2) for n, p in inspect.signature(obj).parameters.items()}
    rows = [(stars.get(n, "") + n, type_text(p.anno), default_text(p.default), p.docment or inherited_comment(obj, n))
            for n, p in found.items() if n not in ("self", "cls")]
    if returned is None or (returned.anno in (EMPTY, None) and not returned.docment):
        return rows, None
    return rows, ("**returns**", type_text(returned.anno), "", returned.docment)


def table(rows, returned=None):
    "Markdown of the rows that `parameter_rows` gives."
    if not rows and not returned:
        return ""
    body = [(code(n), code(t), code(d), prose(c)) for n, t, d, c in rows]
    if returned:
        body.append((returned[0], code(returned[1]), "", prose(returned[3])))
    head = [("name", "type", "default", "meaning"), ("---",) * 4]
    return "\n".join("| " + " | ".join(row) + " |" for row in head + body)


def signature_text(name, obj):
    "How a function is called: its parameters without their types, which the table has."
    try:
        signature = inspect.signature(obj)
    except (TypeError, ValueError):
        return ""
    kept = [p.replace(annotation=EMPTY) for n, p in signature.parameters.items() if n not in ("self", "cls")]
    words = []
    for p in kept:
        default = "" if p.default is EMPTY else f"={default_text(p.default)}"
        words.append(str(p.replace(default=EMPTY)) + default)
    keywords = [i for i, p in enumerate(kept) if p.kind is p.KEYWORD_ONLY]
    if keywords and not any(p.kind is p.VAR_POSITIONAL for p in kept):
        words.insert(keywords[0], "*")
    wrapped = textwrap.fill(f"{name}({', '.join(words)})", 92, subsequent_indent=" " * 4, break_long_words=False,
                            break_on_hyphens=False)
    return f"```python\n{wrapped}\n```"


def function_parts(name, obj):
    return [signature_text(name, obj), prose(obj.__doc__), table(*parameter_rows(obj))]


def methods(cls):
    "(name, function) of the public methods and properties that a class defines itself."
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (classmethod, staticmethod)):
            yield name, member.__func__
        elif isinstance(member, property):
            yield name, member.fget
        elif inspect.isfunction(member):
            yield name, member


def own_doc(cls):
    "The docstring of a class, unless it is inherited or was made by the machine."
    text = vars(cls).get("__doc__") or ""
    return "" if text.startswith(f"{cls.__name__}(") else text


def class_parts(name, cls, source):
    "Fields or parameters of a class, then its public methods."
    fields = issubclass(cls, tuple)
    own_init = is_dataclass(cls) or "__init__" in vars(cls)
    rows = field_rows(source) if fields else parameter_rows(cls)[0] if own_init else []
    parts = [signature_text(name, cls) if rows or own_init else "", prose(own_doc(cls)), table(rows)]
    bases = [b.__name__ for b in cls.__bases__ if b not in (object, tuple)]
    if bases:
        parts.append("A subclass of " + ", ".join(map(code, bases)) + ".")
    for method, function in methods(cls):
        if function.__doc__ or any(row[3] for row in parameter_rows(function)[0]):
            parts += [f"### {name}.{method}", *function_parts(method, function)]
    return parts


def constant_parts(source):
    lines = textwrap.dedent(source).splitlines()
    more = ["..."] if len(lines) > LONGEST_CONSTANT else []
    return ["```python\n" + "\n".join(lines[:LONGEST_CONSTANT] + more) + "\n```"]


def entry(name, obj, where, notebook):
    "The part of a page about one public name."
    if inspect.isclass(obj):
        parts = class_parts(name, obj, where.source)
    elif callable(obj) and (inspect.isfunction(obj) or hasattr(obj, "__wrapped__")):
        parts = function_parts(name, obj)
    else:
        parts = constant_parts(where.source)
    origin = f"[Defined in the notebook]({notebook}#cell-{where.cell})" if notebook and where.cell else ""
    return "\n\n".join(p for p in (f"## {name}", *parts, origin) if p)


def module_page(module, path, notebook=None, title=None):
    "Markdown of a module's page. `notebook`: address of its notebook's page, relative to this page."
    loaded = importlib.import_module(module)
    where = definitions(path.read_text(encoding="utf-8"))
    names = [n for n in getattr(loaded, "__all__", []) if n in where]
    order = sorted(names, key=lambda n: list(where).index(n))
    head = [f"# {module}", f"> {prose(loaded.__doc__)}" if loaded.__doc__ else ""]
    if notebook:
        head.append(f"The notebook [{title}]({notebook}) derives, shows and tests this module.")
    entries = [entry(n, getattr(loaded, n), where[n], notebook) for n in order]
    return "\n\n".join(part for part in head + entries if part) + "\n"


def module_name(path, root):
    "domainmix/runs/inputs.py -> domainmix.runs.inputs"
    return ".".join(path.relative_to(root).with_suffix("").parts)


def page_name(module):
    "The page of a module, relative to the root of the site's source."
    return PurePosixPath("api", module.partition(".")[2] + ".md")


def package_modules(root, package="domainmix"):
    "Module name -> file, of every module that a notebook exports."
    found = sorted((root / package).rglob("*.py"))
    return {module_name(p, root): p for p in found if p.stem not in ("__init__", "_modidx")}
