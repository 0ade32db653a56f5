"""The digest of the code that one operation runs.

It covers what `run` and the methods of its `Knobs` reach in their module, every module of this repository that this
imports, directly or not, with docstrings, comments and annotations dropped, and the pinned versions of the packages
imported there. So a changed report or planner re-runs no item, and a changed library version re-runs what uses it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.lib.digests import canonical, digest_bytes
from stages.lib.errors import ConfigError

KNOBS = "Knobs"
INERT_DECORATORS = {"cache", "contextlib", "contextmanager", "dataclass", "dataclasses", "functools", "lru_cache"}


def code_digest(root: Path, module: str, function: str, pins: Mapping[str, str]) -> str:
    """sha256 for `function` of `module` (dotted) in the checkout at `root`; `pins` maps package to version."""
    return digest_and_packages(root, module, function, pins)[0]


def digest_and_packages(root: Path, module: str, function: str, pins: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The same digest, and package -> version of those that it covers."""
    reached = _reached(_parse(root, module), function)
    parts = {f"{module}:{function}": _fingerprint(reached)}
    tops = set()
    imported = _imports(root, reached, tops)
    for name in sorted(closure(root, imported)):
        body = _parse(root, name).body
        parts[name] = _fingerprint(body)
        _imports(root, body, tops)
    packages = {package: _pinned(package, pins) for package in sorted(_distributions(tops))}
    return digest_bytes(canonical({"code": parts, "packages": packages})), packages


def closure(root: Path, modules: Iterable[str]) -> set[str]:
    """The modules of this repository that `modules` import, directly or not, and themselves."""
    found, left = set(), list(modules)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _imports(root, _parse(root, name).body, set())
    return found


def source_files(root: Path, module: str) -> list[str]:
    """Paths, relative to `root`, of the module and all it imports from this repository: what DVC must watch."""
    return sorted(str(_file(root, name).relative_to(root)) for name in closure(root, [module]))


def read_pins(constraints: Path) -> dict[str, str]:
    """package -> version of a constraints file, names normalised, local parts such as +cpu dropped."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in constraints.read_text().splitlines())
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    return {_normal(name): version.strip().split("+")[0] for name, version in pairs}


def check_installed(pins: Mapping[str, str]) -> None:
    """Raises ConfigError where an installed package has another version than its pin."""
    for dist in importlib.metadata.distributions():
        name = _normal(dist.metadata["Name"] or "")
        if name in pins and pins[name] != (version := dist.version.split("+")[0]):
            raise ConfigError(f"{name} {version} is installed, constraints.txt pins {pins[name]}\n"
                              "  `pip install -c constraints.txt -e .` installs the pinned versions")


def _pinned(package: str, pins: Mapping[str, str]) -> str:
    if package not in pins:
        raise ConfigError(f"package {package} is imported by a stage but not pinned in constraints.txt\n"
                          "  add it to pyproject.toml and run `uv pip compile`")
    return pins[package]


@functools.cache
def _parse(root: Path, module: str) -> ast.Module:
    """The module's syntax tree, relative imports made absolute."""
    path = _file(root, module)
    tree = ast.parse(path.read_text(), str(path))
    package = module.split(".") + ["__init__"] * (path.name == "__init__.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            node.module = ".".join([*package[: -node.level], *filter(None, [node.module])])
            node.level = 0
    return tree


def _file(root: Path, module: str) -> Path:
    base = root.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _exists(root: Path, module: str) -> bool:
    return _file(root, module).is_file()


def _imports(root: Path, nodes: Iterable[ast.AST], packages: set[str]) -> list[str]:
    """This repository's modules imported anywhere in `nodes`; the others' top-level names go to `packages`."""
    own = []
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _exists(root, name) else node.module for name in inner]
        else:
            continue
        for name in names:
            (own.append if name.split(".")[0] == "stages" else packages.add)(name)
    return own


def _reached(tree: ast.Module, function: str) -> list[ast.stmt]:
    """The top-level statements that `function` needs: definitions and imports it names, directly or not."""
    defined: dict[str, list[ast.stmt]] = {}
    always = []
    body = [_behaviour(statement) for statement in tree.body]
    for statement in body:
        names = _defined_names(statement)
        for name in names:
            defined.setdefault(name, []).append(statement)
        if not names and not _is_docstring(statement):
            always.append(statement)
    left, wanted = [function, KNOBS, *(name for s in always for name in _used_names(s))], set()
    while left:
        name = left.pop()
        if name in defined and name not in wanted:
            wanted.add(name)
            left += [used for statement in defined[name] for used in _used_names(statement)]
    keep = {id(statement) for name in wanted for statement in defined[name]} | {id(s) for s in always}
    return [_narrowed(s, wanted) for s in body if id(s) in keep and not _is_future(s)]


def _behaviour(statement: ast.stmt) -> ast.stmt:
    """The class of `run`'s first argument without plain fields, whose values are in the key; other statements as is."""
    if not isinstance(statement, ast.ClassDef) or statement.name != KNOBS:
        return statement
    body: list[ast.stmt] = [inner for inner in statement.body if isinstance(inner, ast.FunctionDef)]
    for inner in statement.body:
        if isinstance(inner, ast.AnnAssign):
            types = {node.id for node in ast.walk(inner.annotation) if isinstance(node, ast.Name)}
            body += [ast.Expr(ast.Name(name, ast.Load())) for name in sorted(types - set(dir(builtins)))]
    return ast.ClassDef(KNOBS, statement.bases, statement.keywords, body or [ast.Pass()], [])


def _narrowed(statement: ast.stmt, wanted: set[str]) -> ast.stmt:
    """An import with only the wanted names; any other statement as it is."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)) or statement.names[0].name == "*":
        return statement
    names = [alias for alias in statement.names if (alias.asname or alias.name.split(".")[0]) in wanted]
    if isinstance(statement, ast.Import):
        return ast.Import(names=names)
    return ast.ImportFrom(module=statement.module, names=names, level=statement.level)


def _defined_names(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement defines and does nothing else; none where it may do more."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        decorators = {node.id for outer in statement.decorator_list for node in ast.walk(outer)
                      if isinstance(node, ast.Name)}
        return [] if decorators - INERT_DECORATORS else [statement.name]  # another may enter it in a register
    if isinstance(statement, (ast.Import, ast.ImportFrom)) and statement.names[0].name != "*":
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.expr)]
        plain = all(isinstance(node, (ast.Name, ast.Tuple, ast.List, ast.Starred)) for node in nodes)
        return [node.id for node in nodes if isinstance(node, ast.Name)] if plain else []
    return []


def _used_names(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(_Bare().visit(_copy(statement))) if isinstance(node, ast.Name)}


def _fingerprint(statements: Iterable[ast.stmt]) -> str:
    dumped = [ast.dump(_Bare().visit(_copy(s))) for s in statements if not _is_docstring(s) and not _is_future(s)]
    return digest_bytes("\n".join(dumped).encode())


def _copy(statement: ast.stmt) -> ast.stmt:
    return ast.parse(ast.unparse(statement)).body[0]


def _is_docstring(statement: ast.stmt) -> bool:
    return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str))


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


class _Bare(ast.NodeTransformer):
    """Drops docstrings and the annotations of functions."""

    def _visit_body(self, node):
        self.generic_visit(node)
        node.body = [s for s in node.body if not _is_docstring(s)] or [ast.Pass()]
        return node

    def visit_ClassDef(self, node):
        return self._visit_body(node)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self._visit_body(node)

    def visit_arg(self, node):
        node.annotation = None
        return node


def _distributions(modules: set[str]) -> set[str]:
    tops = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    return {_normal(name) for top in tops for name in _distribution_of().get(top, [top])}


@functools.cache
def _distribution_of() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
