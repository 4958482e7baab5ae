"""The rules of `docs/architecture.md` on imports and globals, read from the source without running it.

Imports are collected from every file's syntax tree. An import at module level runs when the module is imported,
together with the `__init__` files above it; so "never imports torch" is a question about everything reachable that way,
and the answer names the chain.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "titan_fp8"

# From the top down. A part imports parts of lower rows only; parts of one row do not know each other.
LAYERS = (
    ("launch",),
    ("train", "cli"),
    ("building",),
    ("trainer",),
    ("model_plan",),
    ("job_config", "train_state"),
    ("converters", "parallel", "data", "optim", "checkpoint", "observability"),
    ("models", "quantization"),
    ("kernels",),
    ("config",),
    ("runtime",),
)

# A part that stands in several files at the top.
SAME_PART = {"job_rules": "job_config", "family_rules": "job_config"}

# What an answer in well under a second cannot afford.
HEAVY = {"torch", "triton", "numpy", "pandas", "pyarrow", "datasets", "tokenizers", "transformers", "safetensors"}
HEAVY |= {"tensorboard", "matplotlib", "wandb"}

# Packages that are heavy or optional, imported where they are used.
LAZY_PACKAGES = {"triton", "datasets", "pyarrow", "pandas", "matplotlib", "tensorboard", "wandb", "transformers"}
LAZY_MODULES = {"torch.utils.tensorboard"}

MUTABLE_BUILTINS = {"dict", "list", "set", "bytearray", "defaultdict", "OrderedDict", "deque", "Counter"}
MUTATING_METHODS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard"}
MUTATING_METHODS |= {"clear", "sort", "reverse", "appendleft", "popleft"}


@dataclass(frozen=True)
class Import:
    """`target` imported by `module` in `line`; `function` is the innermost function around it, "" at module level."""

    module: str
    target: str
    line: int
    function: str
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"), filename=str(modules()[module]))


def is_init(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def statements(node: ast.AST, function: str = "", typing_only: bool = False) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every node below `node` with the function around it and whether only a type checker gets there."""
    for child in ast.iter_child_nodes(node):
        yield child, function, typing_only
        inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        guard = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        yield from statements(child, inside, typing_only or guard)


@cache
def imports(module: str) -> tuple[Import, ...]:
    found = []
    for node, function, typing_only in statements(tree(module)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            below = [f"{base}.{alias.name}" for alias in node.names]
            targets = sorted({name if name in modules() or name in LAZY_MODULES else base for name in below})
        else:
            continue
        found += [Import(module, target, node.lineno, function, typing_only) for target in targets]
    return tuple(found)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) - node.level + is_init(module)]
    return ".".join([*parents, *([node.module] if node.module else [])])


def all_imports() -> list[Import]:
    return [found for module in modules() for found in imports(module)]


def chain_to(module: str, packages: frozenset[str]) -> tuple[str, ...] | None:
    """How importing `module` comes to import one of `packages` (shortest first), or None if it does not."""
    queue, seen = [(module,)], {module}
    for chain in queue:
        name = chain[-1]
        if name.split(".")[0] in packages:
            return chain
        if name not in modules():
            continue
        parent = name.rpartition(".")[0]
        run = [found.target for found in imports(name) if not found.function and not found.typing_only]
        for target in [*([parent] if parent else []), *run]:
            if target not in seen:
                seen.add(target)
                queue.append((*chain, target))
    return None


def part_of(module: str) -> str:
    """`titan_fp8.models.rope` -> `models`; the package itself is the empty part."""
    name = module.split(".")[1] if "." in module else ""
    return SAME_PART.get(name, name)


def layer_of(part: str) -> int:
    return next(depth for depth, row in enumerate(LAYERS) if part in row)


def is_section_module(module: str) -> bool:
    """A component's `config.py`: it holds section classes, which are made of `titan_fp8.config`."""
    return module.count(".") == 2 and module.endswith(".config")


def report(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_every_part_of_the_package_has_a_layer():
    known = {part for row in LAYERS for part in row}
    parts = {part_of(module) for module in modules()} - {""}
    assert parts <= known, f"give {sorted(parts - known)} a row in LAYERS"


def test_imports_point_down_and_never_sideways():
    violations = []
    for found in all_imports():
        if found.target.split(".")[0] != PACKAGE or "." not in found.module:
            continue
        own, other = part_of(found.module), part_of(found.target)
        allowed = own == other or (is_section_module(found.module) and other == "config")
        if not allowed and (not other or layer_of(other) <= layer_of(own)):
            violations.append(f"{found}, which is not below {own}")
    report(violations)


def test_kernels_import_only_torch_triton_the_standard_library_and_runtime():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    report(
        [
            str(found)
            for found in all_imports()
            if part_of(found.module) == "kernels"
            and found.target.split(".")[0] not in allowed
            and not found.target.startswith((f"{PACKAGE}.kernels", f"{PACKAGE}.runtime"))
        ]
    )


def test_only_kernel_files_need_triton_to_be_imported():
    violations = []
    for module in modules():
        is_kernel_file = part_of(module) == "kernels" and not is_init(module) and not module.endswith(".reference")
        chain = chain_to(module, frozenset({"triton"}))
        if chain and not is_kernel_file:
            violations.append(" -> ".join(chain))
    report(violations)


def test_configuration_and_entry_points_import_nothing_heavy():
    light = {f"{PACKAGE}.{name}" for name in ("job_config", "train", "cli.main")}
    chosen = [
        module for module in modules() if module in light or part_of(module) == "config" or is_section_module(module)
    ]
    assert f"{PACKAGE}.job_config" in chosen
    report([" -> ".join(chain) for module in chosen if (chain := chain_to(module, frozenset(HEAVY)))])


def test_package_inits_load_their_names_lazily():
    inits = [module for module in modules() if is_init(module) and part_of(module) != "kernels"]
    report([" -> ".join(chain) for module in inits if (chain := chain_to(module, frozenset(HEAVY)))])


def test_importing_the_entry_point_really_loads_no_torch():
    program = f"import sys, {PACKAGE}.train; sys.exit(sorted({HEAVY!r} & sys.modules.keys()) or 0)"
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def test_imports_inside_functions_are_the_lazy_ones():
    """Lazy are: optional and heavy packages, names of a package's `__init__`, and what a light module leads to."""
    violations = []
    for found in all_imports():
        root = found.target.split(".")[0]
        if not found.function or root in LAZY_PACKAGES or found.target in LAZY_MODULES:
            continue
        serves_init = is_init(found.module) and found.function == "__getattr__"
        needs_lazy = found.target in modules() and chain_to(found.target, frozenset(LAZY_PACKAGES))
        entry = part_of(found.module) in ("train", "cli") and not chain_to(found.module, frozenset(HEAVY))
        if not (serves_init or needs_lazy or entry):
            violations.append(f"{found} inside {found.function}()")
    report(violations)


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in MUTABLE_BUILTINS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def _assigned_names(node: ast.AST) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _tables(module: str) -> Iterator[tuple[str, int]]:
    """Name and line of what is mutable and assigned at module level."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_mutable(node.value):
            yield from ((name, node.lineno) for name in _assigned_names(node))


def _is_constant_name(name: str) -> bool:
    return name == name.upper() or (name.startswith("__") and name.endswith("__"))


def test_a_mutable_module_global_is_a_constant_table():
    report(
        [
            f"{module}:{line}: {name} is mutable and not named as a constant table"
            for module in modules()
            for name, line in _tables(module)
            if not _is_constant_name(name)
        ]
    )


def _changed_names(node: ast.AST) -> list[str]:
    """Names of the containers that `node` changes: `X[k] = v`, `del X[k]`, `X[k] += v`, `X.append(v)`."""
    if isinstance(node, ast.Call):
        method = node.func
        calls = isinstance(method, ast.Attribute) and method.attr in MUTATING_METHODS
        return [method.value.id] if calls and isinstance(method.value, ast.Name) else []
    targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [getattr(node, "target", None)]
    items = [target.value for target in targets if isinstance(target, ast.Subscript)]
    return [item.id for item in items if isinstance(item, ast.Name)]


def test_no_function_changes_a_module_global():
    violations = []
    for module in modules():
        tables = {name for name, _ in _tables(module)}
        for node, function, _ in statements(tree(module)):
            if isinstance(node, ast.Global):
                violations.append(f"{module}:{node.lineno}: `global {', '.join(node.names)}` in {function}()")
            elif function and isinstance(node, ast.Call | ast.Assign | ast.AugAssign | ast.Delete):
                changed = tables.intersection(_changed_names(node))
                violations += [f"{module}:{node.lineno}: {function}() changes {name}" for name in sorted(changed)]
    report(violations)


def test_importing_a_module_does_no_work():
    """A call that stands alone at module level is work, unless it registers something."""
    violations = []
    for module in modules():
        for node in tree(module).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                call = ast.unparse(node.value.func)
                if "register" not in call.lower():
                    violations.append(f"{module}:{node.lineno}: {call}(...) runs on import")
    report(violations)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn", [("torch.nn", "", False)]),
        ("from titan_fp8.runtime import errors", [("titan_fp8.runtime.errors", "", False)]),
        ("from titan_fp8.runtime.errors import UserError", [("titan_fp8.runtime.errors", "", False)]),
        ("def f():\n    import wandb", [("wandb", "f", False)]),
        ("if TYPE_CHECKING:\n    from torch import Tensor", [("torch", "", True)]),
        ("try:\n    import triton\nexcept ImportError:\n    pass", [("triton", "", False)]),
        ("class A:\n    def g(self):\n        from . import linear", [("titan_fp8.models.linear", "g", False)]),
    ],
)
def test_the_import_scanner_sees(source, found, monkeypatch):
    monkeypatch.setattr(f"{__name__}.tree", lambda module: ast.parse(source))
    scanned = imports.__wrapped__("titan_fp8.models.decoder")
    assert [(seen.target, seen.function, seen.typing_only) for seen in scanned] == found
