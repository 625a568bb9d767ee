"""The faults that scripts/tools/mutation.py makes: mutmut's, and those of `OWN_OPERATORS`.

Not mutated: GPU kernels that tests only interpret, texts (docstrings, `raise`, printing, logging, --help), annotations,
assertions, and arguments that guard against what cannot happen or only save time.
"""

import contextlib
import difflib
import functools
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

UNMUTATED_MODULES = ("rows/pallas.py", "rows/triton.py", "rows/triton_kernels.py")
UNMUTATED_CALLS = {"print", "say", "info", "warning", "warn", "add_argument", "ArgumentParser", "Progress", "getLogger"}
UNMUTATED_ARGUMENTS = ("strict=", "frozen=True", "maxsize=")
SWAPS = {"min": "max", "minimum": "maximum", "any": "all", "sum": "mean", "floor": "ceil", "zeros": "ones"}
SWAPS |= {new: old for old, new in SWAPS.items()} | {"sorted": "list"}


def swap_function(call: cst.Call) -> Iterator[cst.Call]:
    """Yields `max(x)` for `min(x)`, and so on through `SWAPS`."""
    name = getattr(call.func, "attr", call.func)
    if isinstance(name, cst.Name) and name.value in SWAPS:
        yield call.with_deep_changes(name, value=SWAPS[name.value])


def drop_condition(condition: cst.BooleanOperation) -> Iterator[cst.BaseExpression]:
    """Yields `a` and `b` for `a and b`."""
    yield from (condition.left, condition.right)


def negate_condition(statement: cst.If | cst.While | cst.CompIf) -> Iterator[cst.CSTNode]:
    """Yields `if not (a)` for `if a`."""
    condition = statement.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield statement.with_changes(test=cst.UnaryOperation(cst.Not(), condition))


def delete_statement(statement: cst.Expr) -> Iterator[cst.Pass]:
    """Yields `pass` for a call whose result is not used."""
    yield cst.Pass()


OWN_OPERATORS: list[tuple[Any, Callable[[Any], Any]]] = [
    (cst.Call, swap_function),
    (cst.BooleanOperation, drop_condition),
    ((cst.If, cst.While, cst.CompIf), negate_condition),
    (cst.Expr, delete_statement),
]


@dataclass
class Mutant:
    module: str  # path from the root of the repository
    lines: range  # from the start of the statement to the change
    code: str  # of the whole module
    diff: str  # the changed lines

    @property
    def key(self) -> str:
        """Identifies the mutant whatever changes elsewhere in its module."""
        return f"{self.module}\n{self.diff}"


class Finder(cst.CSTVisitor):
    """Collects, by operator, (lines, node, replacement) of every mutant of a module."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[tuple[range, cst.CSTNode, cst.CSTNode]]] = defaultdict(list)
        self._statements = [1]  # first lines of those that are being visited

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Raise | cst.Assert | cst.Import | cst.ImportFrom) or is_text(node):
            return False
        line = 1 if isinstance(node, cst.Module) else self.get_metadata(PositionProvider, node).start.line
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self._statements.append(line)
        lines = range(min(line, self._statements[-1]), line + 1)
        for kind, operator in [*mutation_operators, *OWN_OPERATORS]:
            if isinstance(node, kind):
                self.found[operator.__name__] += [(lines, node, new) for new in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self._statements.pop()


def is_text(node: cst.CSTNode) -> bool:
    """Returns whether `node` is a docstring, a list of exported names, or a call that prints, logs or describes."""
    if isinstance(node, cst.Expr):
        return isinstance(node.value, cst.BaseString) or is_text(node.value)
    if isinstance(node, cst.Assign):
        return getattr(node.targets[0].target, "value", "") == "__all__"
    name = getattr(node.func, "attr", node.func) if isinstance(node, cst.Call) else None
    return isinstance(name, cst.Name) and name.value in UNMUTATED_CALLS


def mutants(root: Path, module: str, seed: int) -> list[Callable[[], Mutant]]:
    """Returns a maker of each mutant of a module, in an order drawn from `seed` in which the operators take turns."""
    finder, wrapper = Finder(), MetadataWrapper(cst.parse_module((root / module).read_text()))
    wrapper.visit(finder)
    before, show = wrapper.module.code.splitlines(), wrapper.module.code_for_node

    def draw(found: tuple[range, cst.CSTNode, cst.CSTNode]) -> str:
        return hashlib.sha256(
            f"{seed} {module} {before[found[0][-1] - 1]} {[*map(show, found[1:])]}".encode()
        ).hexdigest()

    def make(lines: range, node: cst.CSTNode, new: cst.CSTNode) -> Mutant:
        code = cst.ensure_type(wrapper.module.deep_replace(node, new), cst.Module).code
        diff = list(difflib.unified_diff(before, code.splitlines(), lineterm="", n=0))[3:]
        return Mutant(module, lines, code, "\n".join(line for line in diff if line[0] in "+-"))

    turns = itertools.zip_longest(*[sorted(found, key=draw) for found in finder.found.values()])
    return [functools.partial(make, *found) for found in itertools.chain(*turns) if found]


def sample(root: Path, package: str, size: int, seed: int) -> list[Mutant]:
    """Returns `size` mutants of a package (0: all), from each module in proportion to how many it has."""
    ranked = []
    for path in sorted((root / "kdjax" / package).rglob("*.py")):
        makers = mutants(root, str(path.relative_to(root)), seed) if not str(path).endswith(UNMUTATED_MODULES) else []
        ranked += [((rank + 0.5) / len(makers), str(path), make) for rank, make in enumerate(makers)]
    chosen: dict[str, Mutant] = {}
    for _, _, make in sorted(ranked, key=lambda place: place[:2]):
        mutant = make()
        removed = [line for line in mutant.diff.splitlines() if line.startswith("-")]
        with contextlib.suppress(SyntaxError):
            compile(mutant.code, mutant.module, "exec")
            if not any(argument in line for argument in UNMUTATED_ARGUMENTS for line in removed):
                chosen.setdefault(mutant.key, mutant)
        if len(chosen) == size:
            break
    return list(chosen.values())
