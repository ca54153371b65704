"""The direction of imports, as docs/design of the package draws it: arrows point one way."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pbsp"
LOW = {"errors", "pruning", "binarization", "quantization", "solver"}
ALLOWED = {
    "errors": set(),
    "compiled": {"errors"},
    "pruning": {"errors"},
    "binarization": {"errors", "compiled", "pruning"},
    "solver": {"errors"},
    "methods": LOW,
    "quantization": {"binarization"},
    "storage": {"errors", "pruning", "binarization", "quantization"},
    "kernels": {"errors", "compiled", "pruning", "binarization", "quantization", "storage"},
    "packed_linear": {"errors", "compiled", "pruning", "binarization", "storage", "kernels"},
    "models": {"errors"},
    "torchrun": {"errors"},
    "distributed": {"errors", "torchrun"},
    "calibration": {"errors", "distributed", "models", "pruning"},
    "allocation": {"errors", "distributed", "models", "pruning", "storage", "methods", "calibration"},
    "evaluation": {"errors", "calibration", "integrations", "resources"},
    "integrations": {
        "errors",
        "models",
        "calibration",
        "quantization",
        "storage",
        "packed_linear",
        "packed_embedding",
    },
    "recovery": {
        "errors",
        "models",
        "pruning",
        "binarization",
        "evaluation",
        "integrations",
        "packed_linear",
    },
}


def imported_parts(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("pbsp.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    files = (
        [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else list((SOURCE / part).glob("**/*.py"))
    )
    assert files
    for path in files:
        assert imported_parts(path) - {part} <= ALLOWED[part], path.name
