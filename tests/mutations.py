"""Ways to break a kernel: small changes of its syntax tree, drawn at random from a fixed seed.

A mutation is a change of the text of one node, so that everything else of a file stays as it is,
comments and all. What cannot change a result is left alone: names of types, tuning, decorators.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """`file` with the characters from `start` to `end` replaced by `after`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    within: str = ""  # the line's text, for there may be several such changes

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}:{self.line}: {self.kind}: {before} -> {after or '(nothing)'}"

    def apply(self, source: str) -> str:
        """The broken source."""
        assert source[self.start : self.end] == self.before
        return source[: self.start] + self.after + source[self.end :]


def draw(path: Path, name: str, count: int, seed: int) -> list[Mutation]:
    """Draw `count` mutations of the file at `path`, called `name`: for a seed always the same."""
    source = path.read_text("utf-8")
    find = of_python if path.suffix == ".py" else of_cuda
    found = sorted(set(find(source, name)), key=lambda m: (m.start, m.end, m.kind, m.after))
    return random.Random(f"{seed} {name}").sample(found, min(count, len(found)))


# --- Python: Triton and Numba.

SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.Pow: "*",
    ast.FloorDiv: "*", ast.Mod: "//",
    ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "&", ast.LShift: ">>", ast.RShift: "<<",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
# A call of the first becomes one of the second: a wrong reduction, identity or function.
CALLS = {
    "sum": "max", "max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum",
    "exp": "exp2", "exp2": "exp", "log": "log2", "log2": "log",
}  # fmt: skip
# Arguments of a call that may be forgotten.
FORGOTTEN = {"mask", "other"}
# Words that mark what is tuning, typing or checking.
HARMLESS = ("_options", "num_warps", "num_stages", "maxnreg", "BLOCK", "dtype", "signature")


def of_python(source: str, name: str) -> Iterator[Mutation]:
    """Every mutation of every function in `source`."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def change(node: ast.AST, kind: str, after: str) -> Mutation:
        start, end = span(node)
        within = source.splitlines()[node.lineno - 1].strip()
        return Mutation(name, node.lineno, kind, start, end, source[start:end], after, within)

    def text(node: ast.AST) -> str:
        start, end = span(node)
        return source[start:end]

    assert source.isascii(), f"{name}: must be ASCII, for columns are counted in bytes"
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and not function.name.endswith(HARMLESS):
            names = sorted(argument.arg for argument in function.args.args)
            for node in _changeable(function):
                for kind, after in _of_node(node, text, names):
                    if after != text(node):
                        yield change(node, kind, after)


def _changeable(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of its body that decide a result."""
    queue: list[ast.AST] = list(function.body[bool(ast.get_docstring(function)) :])
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.FunctionDef | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            continue  # a nested function is walked for itself
        if isinstance(node, ast.keyword) and node.arg in HARMLESS:
            continue
        yield node
        children = ast.iter_child_nodes(node)
        if isinstance(node, ast.AnnAssign):
            children = iter([node.value] if node.value else [])
        queue += children


def _of_node(node, text, names) -> Iterator[tuple[str, str]]:
    """(kind, new text) of every change of one node."""
    if isinstance(node, ast.BinOp):
        yield "operator", f"({text(node.left)}) {SWAPS[type(node.op)]} ({text(node.right)})"
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            yield "dropped", f"({text(node.left)})"
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield "operator", f"{text(node.target)} {SWAPS[type(node.op)]}= {text(node.value)}"
        yield "no accumulation", f"{text(node.target)} = {text(node.value)}"
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        left, right = text(node.left), text(node.comparators[0])
        yield "comparison", f"({left}) {SWAPS[type(node.ops[0])]} ({right})"
    elif isinstance(node, ast.UnaryOp):
        yield "sign", f"({text(node.operand)})"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", repr(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        pass  # its condition, if a comparison, is changed as one
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "left out", "pass"
    elif isinstance(node, ast.Call):
        yield from _of_call(node, text)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield from _of_name(node.id, names)


def _of_call(node, text) -> Iterator[tuple[str, str]]:
    called = text(node.func)
    arguments = [text(a) for a in (*node.args, *node.keywords)]
    word = called.rpartition(".")[2]
    if word in CALLS:
        renamed = called[: len(called) - len(word)] + CALLS[word]
        yield "function", f"{renamed}({', '.join(arguments)})"
    if word == "where" and len(node.args) == 3:
        yield "no condition", f"({arguments[1]})"
    if word in ("maximum", "minimum") and len(node.args) == 2:
        yield "no limit", f"({arguments[0]})"
    for keyword in node.keywords:
        if keyword.arg in FORGOTTEN:
            kept = [a for a in arguments if not a.startswith(f"{keyword.arg}=")]
            yield "forgotten", f"{called}({', '.join(kept)})"


def _of_name(name: str, names: list[str]) -> Iterator[tuple[str, str]]:
    """Another argument with the same last word: `k_stride` for `x_stride`, `v_ptr` for `k_ptr`."""
    if name not in names:
        return
    first, _, last = name.rpartition("_")
    alike = [n for n in names if first and n != name and n.rpartition("_")[2] == last]
    if alike:
        at = names.index(name)
        yield "wrong argument", next((n for n in alike if names.index(n) > at), alike[0])


# --- CUDA C++.

CUDA_SWAPS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "==": "!=", "!=": "==", "&": "|", "|": "&", "<<": ">>", ">>": "<<", "&&": "||", "||": "&&",
    "+=": "=", "-=": "=", "*=": "=",
}  # fmt: skip
CUDA_CALLS = {"expf": "exp2f", "logf": "log2f", "fmaxf": "fminf", "rsqrtf": "sqrtf", "max": "min"}


def of_cuda(source: str, name: str) -> Iterator[Mutation]:
    """Every mutation of every function body in `source`."""
    import tree_sitter_cuda
    from tree_sitter import Language, Parser

    tree = Parser(Language(tree_sitter_cuda.language())).parse(source.encode("ascii"))

    def change(node, kind: str, after: str) -> Mutation:
        start, end = node.start_byte, node.end_byte
        line = node.start_point[0] + 1
        within = source.splitlines()[line - 1].strip()
        return Mutation(name, line, kind, start, end, source[start:end], after, within)

    def text(node) -> str:
        return source[node.start_byte : node.end_byte]

    def walk(node, inside: bool, names: list[str]) -> Iterator[Mutation]:
        if node.type == "function_definition":
            inside, names = False, sorted(_parameters(node, text))
            body = node.child_by_field_name("body")
            if body is not None:
                yield from walk(body, True, names)
            return
        if inside and node.type in ("static_assert_declaration", "template_argument_list"):
            return
        if inside:
            for kind, after in _of_cuda_node(node, text, names):
                if after != text(node):
                    yield change(node, kind, after)
        for child in node.children:
            yield from walk(child, inside, names)

    yield from walk(tree.root_node, False, [])


def _parameters(function, text) -> Iterator[str]:
    queue = [function.child_by_field_name("declarator")]
    while queue:
        node = queue.pop()
        if node.type == "parameter_declaration":
            words = text(node).replace("*", " ").replace("&", " ").split()
            yield words[-1]
        else:
            queue += node.children


def _of_cuda_node(node, text, names) -> Iterator[tuple[str, str]]:
    kind = node.type
    if kind in ("binary_expression", "assignment_expression"):
        operator = node.child_by_field_name("operator")
        left, right = (text(node.child_by_field_name(side)) for side in ("left", "right"))
        word = text(operator)
        if word in CUDA_SWAPS:
            yield "operator", f"{left} {CUDA_SWAPS[word]} {right}"
        if word in ("+", "-", "*"):
            yield "dropped", left
    elif kind == "number_literal" and text(node).isdigit():
        yield "constant", str(int(text(node)) + 1)
    elif kind == "number_literal" and text(node).endswith("f"):
        yield "constant", f"({text(node)} + 1.0f)"
    elif kind == "expression_statement" and node.children[0].type == "call_expression":
        yield "left out", ";"
    elif kind == "call_expression":
        called = text(node.child_by_field_name("function"))
        if called in CUDA_CALLS:
            yield "function", CUDA_CALLS[called] + text(node.child_by_field_name("arguments"))
    elif kind == "conditional_expression":
        yield "no condition", text(node.child_by_field_name("consequence"))
    elif kind == "identifier":
        yield from _of_name(text(node), names)
