"""API entries from the text of an export cell: signatures, the comments beside parameters, docstrings.

It reads source and imports nothing, so the site can be built without PyTorch, and a cell that does not run is still
documented. The entries are MyST directives of Sphinx's Python domain: they appear in the search and in the index.
"""
from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize

Definition = ast.FunctionDef | ast.AsyncFunctionDef


def _comments(source: str) -> dict[int, str]:
    "Line number -> the comment beside the code on it; comments on lines of their own right below carry it on."
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        text = token.string.lstrip("#").strip()
        if token.line[:column].strip():
            beside[row] = text
        elif row - 1 in beside:  # a line of its own: part of the comment above
            first = row - 1
            beside[first] = f"{beside[first]} {text}"
            beside[row] = beside.pop(first)
            beside[first] = beside[row]
    return beside


def _cell(text: str) -> str:
    "Text for one cell of a Markdown table."
    return " ".join(text.split()).replace("|", "\\|")


def _type(node: ast.AST) -> str:
    "An annotation as a reader says it: a class that is named before it exists needs quotes in code, not on a page."
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def _code(node: ast.AST | None) -> str:
    return "" if node is None else f"`{_cell(ast.unparse(node))}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    "A Markdown table without the columns that are empty in every row."
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in used], ["---"] * len(used)] + [[row[i] for i in used] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _parameters(function: Definition, comments: dict[int, str]) -> str:
    "The table of a function's parameters and of what it returns; empty when there is nothing to say beyond the signature."
    a = function.args
    positional = a.posonlyargs + a.args
    defaults = dict(zip([x.arg for x in positional][len(positional) - len(a.defaults):], a.defaults))
    defaults |= {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
    everything = positional + ([a.vararg] if a.vararg else []) + a.kwonlyargs + ([a.kwarg] if a.kwarg else [])
    stars = {a.vararg.arg: "*"} if a.vararg else {}
    stars |= {a.kwarg.arg: "**"} if a.kwarg else {}
    rows = []
    for i, x in enumerate(everything):
        if i == 0 and x.arg in ("self", "cls") and x.annotation is None:
            continue
        default = defaults.get(x.arg)
        row = (default or x).end_lineno
        shared = i + 1 < len(everything) and everything[i + 1].lineno == row
        comment = "" if shared else comments.get(row, "")
        kind = f"`{_cell(_type(x.annotation))}`" if x.annotation else ""
        rows.append([f"`{stars.get(x.arg, '')}{x.arg}`", kind, _code(default), _cell(comment)])
    if function.returns is not None and comments.get(function.returns.end_lineno):
        rows.append(["**returns**", f"`{_cell(_type(function.returns))}`", "", _cell(comments[function.returns.end_lineno])])
    return _table(["parameter", "type", "default", "meaning"], rows) if any(row[3] for row in rows) else ""


def _signature(function: Definition, method: bool) -> str:
    function = ast.parse(ast.unparse(function)).body[0]  # a copy without comments
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    if method and not static:
        (function.args.posonlyargs or function.args.args).pop(0)
    returns = "" if function.returns is None else f" -> {_type(function.returns)}"
    return f"({ast.unparse(function.args)}){returns}"


def _docstring(node: ast.AST) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def _directive(kind: str, signature: str, module: str, blocks: list[str], depth: int, options: tuple[str, ...] = ()) -> str:
    fence = ":" * (6 - depth)
    head = [f"{fence}{{py:{kind}}} {signature}", f":module: {module}", *options, ""]
    return "\n".join(head) + "\n\n".join(b for b in blocks if b) + f"\n{fence}"


def _decorators(node: ast.AST) -> set[str]:
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def _function(node: Definition, module: str, comments: dict[int, str], owner: str = "") -> str:
    decorators = _decorators(node)
    if "property" in decorators or "cached_property" in decorators:
        kind, signature, options = "property", f"{owner}{node.name}", ()
        options = () if node.returns is None else (f":type: {_type(node.returns)}",)
    else:
        kind = "method" if owner else "function"
        signature = f"{owner}{node.name}{_signature(node, bool(owner))}"
        options = tuple(f":{d}:" for d in ("staticmethod", "classmethod") if d in decorators)
    return _directive(kind, signature, module, [_docstring(node), _parameters(node, comments)], 1 if owner else 0, options)


def _class(node: ast.ClassDef, module: str, comments: dict[int, str]) -> str:
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name) and f.target.id[0] != "_"]
    functions = [f for f in node.body if isinstance(f, Definition)]
    init = next((f for f in functions if f.name == "__init__"), None)
    if init is not None:
        signature, table = _signature(init, True).split(" -> ")[0], _parameters(init, comments)
    elif _decorators(node) & {"dataclass"}:
        named = [f"{f.target.id}: {ast.unparse(f.annotation)}" + (f" = {ast.unparse(f.value)}" if f.value else "") for f in fields]
        signature, table = f"({', '.join(named)})", ""
    else:
        signature, table = "", ""
    rows = [[f"`{f.target.id}`", _code(f.annotation), _code(f.value), _cell(comments.get(f.end_lineno, ""))] for f in fields]
    if any(row[3] for row in rows):
        table = "\n\n".join(t for t in (table, _table(["field", "type", "default", "meaning"], rows)) if t)
    methods = [
        _function(f, module, comments, owner=f"{node.name}.")
        for f in functions
        if (f.name[0] != "_" or f.name == "__call__") and ast.get_docstring(f)
    ]
    note = [_docstring(init)] if init is not None else []
    return _directive("class", f"{node.name}{signature}", module, [_docstring(node), *note, table, *methods], 0)


def _constants(tree: ast.Module, comments: dict[int, str]) -> str:
    rows = []
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]*", t.id)]
            text = ast.unparse(node.value)
            value, comment = f"`{_cell(text)}`" if len(text) <= 60 else "", _cell(comments.get(node.end_lineno, ""))
            if names and (value or comment):
                rows.append([f"`{names[0]}`", value, comment])
    return _table(["constant", "value", "meaning"], rows) if rows else ""


def entries(
    source: str,  # an export cell without its directives
    module: str,  # compute_layers.game.world
) -> list[str]:   # one MyST text for each public thing defined there, in order
    "What a reader needs to call what the cell defines. Names that start with an underscore are left out."
    tree = ast.parse(source)
    comments = _comments(source)
    found = []
    for node in tree.body:
        if isinstance(node, Definition) and node.name[0] != "_":
            found.append(_function(node, module, comments))
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            found.append(_class(node, module, comments))
    constants = _constants(tree, comments)
    return found + ([constants] if constants else [])
