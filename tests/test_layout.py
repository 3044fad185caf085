"""The order of the modules, the names that are public, and what no file may hold."""

import ast
import functools
import importlib
import inspect
import re
import sys
from graphlib import TopologicalSorter
from inspect import isclass
from operator import attrgetter
from pathlib import Path

import pytest

import pyro_bmr as bmr

ROOT = Path(__file__).parents[1]
LIBRARY, MODELS = ROOT / "pyro_bmr", ROOT / "models"
PAGE = ROOT / "docs" / "index.md"


def order(page):
    """The modules in the order of the page's table: a file, or a folder with its files in the order
    in which its row names them.
    """
    found = []
    for row in re.findall(r"^\| (`[^|]*) \|(.*)\|$", page.read_text(encoding="utf-8"), re.M):
        for name in re.findall(r"`([a-z_]+)(?:\.py|/)`", row[0]):
            is_folder = f"`{name}/`" in row[0]
            found += (
                [f"{name}.{file}" for file in dict.fromkeys(re.findall(r"`([a-z_]+)\.py`", row[1]))]
                + [name]
                if is_folder
                else [name]
            )
    return found


ORDER = order(PAGE)
FORMULAS = [name.removeprefix("formulas.") for name in ORDER if name.startswith("formulas.")]


def module_name(path):
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for path in sorted(LIBRARY.rglob("*.py"))
    if "models" not in path.relative_to(LIBRARY).parts
}
CODE = [
    path
    for folder in ("pyro_bmr", "models", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@functools.cache
def text_of(path):
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path):
    return ast.parse(text_of(path))


@functools.cache
def trees():
    """Module → its syntax tree."""
    return {name: tree_of(path) for name, path in FILES.items()}


def statements(tree):
    """Every statement of a file, those inside of others too; an import is in no expression."""
    below = list(tree.body)
    while below:
        node = below.pop()
        yield node
        for inside in ("body", "orelse", "finalbody", "handlers", "cases"):
            below += getattr(node, inside, ())


def imports(tree, known=()):
    """Every module that is imported anywhere in the file; `from package import module` counts as
    that module.
    """
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


def rank(module):
    """The place of a module; a folder's own `__init__` comes after its files, and `__main__` last
    of all.
    """
    short = module.removeprefix("pyro_bmr.")
    return len(ORDER) if short == "__main__" else ORDER.index(short) if short in ORDER else None


def is_under(module, package):
    return module == package or module.startswith(f"{package}.")


@functools.cache
def inner():
    """Module → the modules of the library that it imports."""
    return {
        name: {m for m in imports(tree, FILES) if is_under(m, "pyro_bmr")}
        for name, tree in trees().items()
    }


def below(module):
    """What is wrong with the imports of a module."""
    if rank(module) is None:
        return [f"{module} has no place in the table of docs/index.md"]
    unknown = {m for m in inner()[module] if m not in FILES or rank(m) is None}
    return [
        f"{module} imports {other}, which has no place in the table of docs/index.md"
        for other in sorted(unknown)
    ] + [
        f"{module} imports {other}, which stands below it"
        for other in sorted(inner()[module] - unknown)
        if not rank(other) < rank(module)
    ]


def test_a_module_imports_only_modules_above_it():
    modules = sorted(set(FILES) - {"pyro_bmr"})
    assert len(modules) > 25 and not [wrong for module in modules for wrong in below(module)]


def test_every_name_of_the_table_is_a_module():
    assert len(set(ORDER)) == len(ORDER) and {f"pyro_bmr.{name}" for name in ORDER} == set(
        FILES
    ) - {"pyro_bmr", "pyro_bmr.__main__"}


def test_there_is_no_cycle():
    graph = {name: others - {name} for name, others in inner().items() if name != "pyro_bmr"}
    found = list(TopologicalSorter(graph).static_order())
    assert set(found) >= set(graph) and found.index("pyro_bmr.errors") < found.index(
        "pyro_bmr.fitting.fit"
    ) < found.index("pyro_bmr.cli.commands")


def test_formulas_know_only_torch_and_numpy():
    allowed = {f"pyro_bmr.formulas.{other}" for other in FORMULAS} | {"pyro_bmr.errors"}
    roots = {"torch", "numpy"} | set(sys.stdlib_module_names)
    assert len(FORMULAS) > 10 and not [
        f"formulas/{name}.py imports {module}"
        for name in FORMULAS
        for module in imports(trees()[f"pyro_bmr.formulas.{name}"], FILES)
        if module.split(".")[0] not in roots and module not in allowed
    ]


def test_numbers_of_a_generator_name_their_device():
    """A caller's default device is another one than that of the generator."""
    made = {"rand", "randn", "randint", "randperm"}
    without = [
        f"{name}: {ast.unparse(node)}"
        for name, tree in trees().items()
        if "generator" in text_of(FILES[name])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        if {"generator"} == {k.arg for k in node.keywords} & {"generator", "device"}
        if ast.unparse(node.func) in {f"torch.{m}" for m in made}
    ]
    assert not without


FOLDERS = [name for name in ORDER if "." not in name and (LIBRARY / name).is_dir()]


def public(folder):
    """The public names of a folder: its `__all__`, or, without one, the classes of `errors.py`."""
    module = importlib.import_module(f"pyro_bmr.{folder}")
    classes = [
        x for x in vars(module).values() if isclass(x) and is_under(x.__module__, "pyro_bmr")
    ]
    return getattr(module, "__all__", [x.__name__ for x in classes])


def test_no_file_hides_a_public_name():
    """A file of that name takes its place in the package once it is imported."""
    names = [f"{folder}.{name}" for folder in FOLDERS for name in public(folder)]
    for folder in FOLDERS:
        importlib.import_module(f"pyro_bmr.{folder}")
    assert len(FOLDERS) > 10 and not [n for n in names if inspect.ismodule(attrgetter(n)(bmr))]


@functools.cache
def public_inside():
    """The public names beside those at the top: "formulas.Dense" and the like."""
    return {f"{folder}.{name}" for folder in (*FOLDERS, "errors") for name in public(folder)}


def test_models_use_the_public_names_only():
    for path in sorted(MODELS.glob("*.py")):
        tree = tree_of(path)
        assert {m for m in imports(tree, FILES) if is_under(m, "pyro_bmr")} <= {"pyro_bmr"}, (
            path.name
        )
        used = {
            name
            for name in re.findall(r"\bbmr\.([a-z_]+\.\w+|\w+)", ast.unparse(tree))
            if name.split(".")[0] not in bmr.__all__
        }
        assert used <= public_inside(), f"{path.name}: {sorted(used - public_inside())}"


@pytest.mark.parametrize(
    "heavy", ["pandas", "joblib", "matplotlib", "sklearn", "onnx", "onnxruntime", "scipy", "dask"]
)
def test_what_few_users_need_is_imported_where_it_is_used(heavy):
    """Every process that imports the library would pay for it: a worker of a study, one of two that
    train, the command line. The estimators, which are scikit-learn's, are imported by name.
    """
    for name, tree in trees().items():
        inside = is_under(name, "pyro_bmr.estimators")
        if heavy == "sklearn" and inside:
            continue
        top = ast.Module(
            [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], []
        )
        found = imports(top, FILES)
        assert heavy not in {module.split(".")[0] for module in found}, (
            f"{name} imports {heavy} at its top"
        )
        assert inside or not any(is_under(module, "pyro_bmr.estimators") for module in found)


def test_no_module_has_the_name_of_a_public_function():
    functions = {name for name in bmr.__all__ if inspect.isroutine(getattr(bmr, name))}
    top = {name.split(".")[1] for name in FILES if name.count(".") >= 1}
    assert {"fit", "reduce", "compare", "load"} <= functions and not functions & top


def test_the_public_names_are_there():
    assert len(set(bmr.__all__)) == len(bmr.__all__) and sorted(bmr.__all__) == list(bmr.__all__)
    imported = {
        alias.asname or alias.name
        for node in trees()["pyro_bmr"].body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    by_name = {"SparseClassifier", "SparseRegressor"}
    assert imported | by_name == set(bmr.__all__) and not imported & by_name


def lacks_a_docstring(name):
    thing = attrgetter(name)(bmr)
    text = thing.__doc__ or ""
    if len(text.split()) < 3:
        return True
    # the signature that dataclasses write is no docstring
    return inspect.isclass(thing) and (
        text.startswith(f"{name.split('.')[-1]}(")
        or any(text == base.__doc__ for base in thing.__mro__[1:])
    )


def test_a_public_name_has_a_docstring_of_its_own():
    names = [*bmr.__all__, *sorted(public_inside())]
    assert len(names) > 100 and not [name for name in names if lacks_a_docstring(name)]


UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_the_library_has_module_docstrings_and_no_pickle():
    library = [p for p in CODE if p.is_relative_to(LIBRARY) or p.is_relative_to(MODELS)]
    # it carries cells between processes, and reads no file
    allowed = {(LIBRARY / "experiments" / "study.py", "joblib")}
    wrong = {path for path in library if not ast.get_docstring(tree_of(path))}
    assert len(library) > 100 and not wrong
    assert not [
        (path, name)
        for path in library
        for name in UNSAFE & {m.split(".")[0] for m in imports(tree_of(path))}
        if (path, name) not in allowed
    ]


def loads(tree, owner):
    return [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == "load"
        and ast.unparse(n.func.value) in owner
    ]


def without(calls, argument, value):
    """The lines of the calls that do not say `argument=value`."""
    return [
        call.lineno
        for call in calls
        if not any(
            k.arg == argument and isinstance(k.value, ast.Constant) and k.value.value is value
            for k in call.keywords
        )
    ]


def test_what_no_file_may_hold():
    assert len(CODE) > 200
    places = [f"/{folder}/" for folder in ("root", "work", "home")]
    assert not [(path, place) for path in CODE for place in places if place in text_of(path)], (
        "a path of one machine"
    )
    of_arrays = re.compile(r"\b(torch|np|numpy)\s*\.\s*load\(")
    for path in (p for p in CODE if of_arrays.search(text_of(p))):
        lines = without(loads(tree_of(path), {"torch"}), "weights_only", True)
        if not path.is_relative_to(ROOT / "tests"):
            lines += without(loads(tree_of(path), {"np", "numpy"}), "allow_pickle", False)
        assert not lines, path


def test_the_checks_see_what_they_look_for():
    tree = ast.parse(
        "import os.path, pyro_bmr.cli\nfrom pyro_bmr.prediction import metrics, predict\nimport"
        " torch\ndef f():\n    from pickle import loads\n    torch.load('x')\n"
    )
    assert imports(tree, FILES) == {
        "os.path",
        "pyro_bmr.cli",
        "pyro_bmr.prediction.metrics",
        "pyro_bmr.prediction.predict",
        "torch",
        "pickle",
    }
    assert without(loads(tree, {"torch"}), "weights_only", True) == [6]
    assert (
        rank("pyro_bmr.errors")
        == 0
        < rank("pyro_bmr.formulas.gaussian")
        < rank("pyro_bmr.priors.gaussian")
        < rank("pyro_bmr.priors")
    )
    assert (
        rank("pyro_bmr.reduction.search")
        < rank("pyro_bmr.reduction.reduce")
        < rank("pyro_bmr.pruning")
        and rank("pyro_bmr.new") is None
    )
    assert len(FILES) > 25 and {"pyro_bmr", "pyro_bmr.guides.point"} <= set(FILES)
