"""Figures of the notebooks' style, printed: how long defining cells and lines are, how much each notebook shows.

`python tools/style.py` prints them for all notebooks together; with `--each` for every notebook. tests/test_house.py
holds them to their limits.
"""
import argparse
import ast
import json
import re
import statistics
from dataclasses import dataclass, field

from sync import ROOT, notebooks

COLUMNS = 120


@dataclass
class Style:
    "What was counted in one notebook."
    name: str
    component: bool = False                           # does it export a module?
    cell_lines: list = field(default_factory=list)    # lines of each defining cell
    definitions: list = field(default_factory=list)   # functions and classes of each defining cell
    lines: int = 0                                    # lines of code
    long_lines: list = field(default_factory=list)    # those of over 120 columns
    code_cells: int = 0
    cells_with_output: int = 0
    pictures: int = 0
    size: int = 0                                     # bytes of the file


def is_export(source):
    return re.match(r"\s*#\s*\|\s*exports?i?\b", source) is not None


def code_lines(source):
    "Lines that are neither blank nor a directive."
    return [line for line in source.splitlines() if line.strip() and not re.match(r"\s*#\s*\|", line)]


def count_definitions(source):
    "Functions and classes at the top of a cell, and whether it defines anything at all."
    body = ast.parse(source).body
    functions = sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in body)
    return functions, functions + sum(isinstance(n, (ast.Assign, ast.AnnAssign)) for n in body)


def measure(path):
    "The style of one notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [("".join(c["source"]), c["outputs"]) for c in cells if c["cell_type"] == "code"]
    style = Style(path.relative_to(ROOT / "nbs").with_suffix("").as_posix(), size=path.stat().st_size)
    style.component = any("default_exp" in source for source, _ in code)
    for source, outputs in code:
        lines = code_lines(source)
        style.lines += len(lines)
        style.long_lines += [line for line in lines if len(line) > COLUMNS]
        style.code_cells += bool(lines)
        style.cells_with_output += bool(outputs)
        style.pictures += sum(kind.startswith("image/") for o in outputs for kind in o.get("data", {}))
        functions, anything = count_definitions(source) if is_export(source) else (0, 0)
        if anything:
            style.cell_lines.append(len(lines))
            style.definitions.append(functions)
    return style


def summary(styles):
    "The figures of all notebooks together: name -> value."
    components = [s for s in styles if s.component]
    lengths = [n for s in components for n in s.cell_lines]
    several = sum(n > 1 for s in components for n in s.definitions)
    return {
        "defining cells": len(lengths),
        "median lines of a defining cell": statistics.median(lengths),
        "longest defining cell": max(lengths),
        f"lines over {COLUMNS} columns, %": 100 * sum(len(s.long_lines) for s in styles) / sum(s.lines for s in styles),
        "cells with two or more definitions, %": 100 * several / len(lengths),
        "code cells with a saved output, %": 100 * sum(s.cells_with_output for s in styles) / sum(s.code_cells for s in styles),
        "component notebooks": len(components),
        "component notebooks with a saved picture": sum(s.pictures > 0 for s in components),
        "component notebooks with a saved output": sum(s.cells_with_output > 0 for s in components),
        "size of all notebooks, MB": sum(s.size for s in styles) / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description="Print figures of the notebooks' style.")
    parser.add_argument("--each", action="store_true", help="a line for every notebook")
    styles = [measure(p) for p in notebooks()]
    if parser.parse_args().each:
        print(f"{'notebook':28}{'cells':>6}{'median':>7}{'longest':>8}{'several':>8}{'long lines':>11}{'pictures':>9}{'KB':>6}")
        for s in styles:
            middle = statistics.median(s.cell_lines) if s.cell_lines else 0
            print(f"{s.name:28}{len(s.cell_lines):6}{middle:7.0f}{max(s.cell_lines, default=0):8}{sum(n > 1 for n in s.definitions):8}"
                  f"{len(s.long_lines):11}{s.pictures:9}{s.size // 1000:6}")
    for name, value in summary(styles).items():
        print(f"{name:42} {value:.1f}" if isinstance(value, float) else f"{name:42} {value}")


if __name__ == "__main__":
    main()
