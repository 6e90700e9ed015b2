"""Imports go down only, and foreign libraries are imported only where this page says so."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module may import its own level and those before it.
LEVELS = [
    ("coat_kernels",),
    ("hf_coat.config",),
    ("hf_coat.functional", "hf_coat.optim"),
    ("hf_coat.modules",),
    ("hf_coat.report",),
    (
        "hf_coat.card",
        "hf_coat.convert",
        "hf_coat.families",
        "hf_coat.live",
        "hf_coat.memory",
        "hf_coat.pays",
        "hf_coat.peak",
        "hf_coat.policy",
        "hf_coat.probe",
        "hf_coat.record",
    ),
    ("hf_coat.integrations", "hf_coat.plots"),
    ("hf_coat.cli",),
    ("hf_coat", "hf_coat.trl"),  # the package's own page: it names what the others offer
    ("examples",),
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# What a part may import beside the standard library and this project. examples may import anything.
FOREIGN = {
    "coat_kernels": {"torch", "triton"},
    "hf_coat": {"torch"},
    "hf_coat.config": {"torch", "transformers", "packaging"},
    "hf_coat.plots": {"matplotlib"},
    "hf_coat.report": {"rich"},
    "hf_coat.integrations": {
        "torch",
        "transformers",
        "accelerate",
        "huggingface_hub",
        "packaging",
        "peft",
        "trl",
        "safetensors",
    },
}


# Imported inside the two methods that reach the Hub, which none but integrations may import.
LATE = {("hf_coat.config", "hf_coat.integrations.hub")}
VERSION = "hf_coat.__version__"  # the one name on the package's page that those below may read


def part_of(name: str) -> str:
    """The part that a module, or a name in a module, belongs to; ``hf_coat.x`` that is no file is the page's."""
    pieces = name.split(".")
    for n in range(len(pieces), 1, -1):
        if ".".join(pieces[:n]) in LEVEL:
            return ".".join(pieces[:n])
    if pieces[0] == "hf_coat" and len(pieces) > 1:
        path = ROOT / "hf_coat" / pieces[1]
        assert not (path.is_dir() or path.with_suffix(".py").exists()), f"{name} is in no level: put it into LEVELS"
    return pieces[0]


def imports(source: str, package: str):
    """Each import in ``source``: its line, the qualified name, and whether it was written relative to ``package``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if node.level and not node.module or base == "hf_coat":  # from . import x: x may be a module
                yield from ((node.lineno, f"{base}.{alias.name}", bool(node.level)) for alias in node.names)
            else:
                yield node.lineno, base, bool(node.level)


def violations(source: str, module: str, package: str) -> list[str]:
    """What the imports in a module's source break, one line each."""
    part, found = part_of(module), []
    for line, name, relative in imports(source, package):
        top = name.split(".")[0]
        if top in ("hf_coat", "coat_kernels"):
            if top == "coat_kernels" and part == "coat_kernels" and not relative:
                found.append(f"{module}:{line} imports {name} by its absolute name; a Hub kernel has another one")
            if name != VERSION and (module, name) not in LATE and LEVEL[part_of(name)] > LEVEL[part]:
                found.append(f"{module}:{line} imports {name}, which is above it")
        elif part != "examples" and top not in sys.stdlib_module_names:
            if top not in FOREIGN.get(part, FOREIGN["hf_coat"]):
                found.append(f"{module}:{line} imports {top}, which {part} must not")
    return found


def modules():
    for base, name in ((ROOT / "kernels", "coat_kernels"), (ROOT, "hf_coat"), (ROOT, "examples")):
        for file in sorted((base / name).rglob("*.py")):
            pieces = file.relative_to(base).with_suffix("").parts
            package = ".".join(pieces[:-1])
            yield file, package if pieces[-1] == "__init__" else ".".join(pieces), package


@pytest.mark.parametrize(("file", "module", "package"), [pytest.param(*m, id=m[1]) for m in modules()])
def test_imports_go_down(file, module, package):
    assert violations(file.read_text(encoding="utf-8"), module, package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_coat.modules.linear", "from ..integrations import trainer"),
        ("hf_coat.modules.linear", "from hf_coat.convert import apply_coat"),
        ("hf_coat.optim.coat_adamw", "from .. import modules"),
        ("hf_coat.convert", "def late():\n    import transformers"),
        ("hf_coat.memory", "from hf_coat import apply_coat"),
        ("hf_coat.report", "import torch"),
        ("coat_kernels.quantize", "from coat_kernels.formats import encode"),
        ("coat_kernels.quantize", "import hf_coat.config"),
        ("coat_kernels.quantize", "import numpy"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(violations(source, module, module.rpartition(".")[0])) == 1


@pytest.mark.parametrize("package", ["hf_coat", "kernels/coat_kernels"])
def test_the_library_does_not_print(package):
    calls = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_no_package_shadows_another():
    """``kernels`` is also a package of Hugging Face's, and test files are imported by their path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert sorted((ROOT / "tests").rglob("__init__.py")) == []
