"""Small mistakes put into working code: rejected answers for DPO."""

import ast

SWAPS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "//"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}


def mutants(code):
    """[(kind, code)]: each with one small mistake, as text that differs from the original in one place only.

    The source is edited rather than the changed tree unparsed, or DPO would learn to tell the two apart by quotes and
    blank lines. Kinds: operator, off by one, bound, missing return, condition.
    """
    raw = code.encode()  # columns of ast count bytes of UTF-8
    lines = [0]
    for line in raw.split(b"\n"):
        lines.append(lines[-1] + len(line) + 1)
    found = []
    for node in ast.walk(ast.parse(code)):
        for kind, start, end, new in mistakes(node, raw, lines):
            mutant = (raw[:start] + new.encode() + raw[end:]).decode()
            if mutant != code and parses(mutant):
                found.append((kind, mutant))
    return list(dict.fromkeys(found))


def mistakes(node, raw, lines):
    """[(kind, start, end, new text)]: edits of the source that put one mistake into the node.

    raw: the source as bytes; lines: the offset of each of its lines. Offsets count bytes.
    """

    def start(n):
        return lines[n.lineno - 1] + n.col_offset

    def end(n):
        return lines[n.end_lineno - 1] + n.end_col_offset

    def swap(left, op, right):
        old, new = SWAPS.get(type(op), (None, None))
        if old is None:
            return []
        between = raw[end(left) : start(right)].decode()  # the operator, and parentheses or line breaks beside it
        return [("operator", end(left), start(right), between.replace(old, new, 1))]

    if isinstance(node, ast.Compare):
        return swap(node.left, node.ops[0], node.comparators[0])
    if isinstance(node, ast.BinOp):
        return swap(node.left, node.op, node.right)
    if isinstance(node, ast.BoolOp):
        return swap(node.values[0], node.op, node.values[1])
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [("off by one", start(node), end(node), str(abs(node.value + step))) for step in (1, -1)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
        stop = node.args[min(len(node.args), 2) - 1]
        return [("bound", end(stop), end(stop), " - 1")]
    if isinstance(node, ast.Slice) and node.lower:
        return [("bound", start(node.lower), end(node.lower), "")]
    if isinstance(node, ast.Slice) and node.upper:
        return [("bound", start(node), start(node), "1")]
    if isinstance(node, ast.Return) and node.value:
        return [("missing return", start(node), start(node) + len("return "), "")]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [("condition", start(node), start(node.operand), "")]
    return []


def parses(code):
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True
