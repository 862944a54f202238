"""The direction of imports and the budgets of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pelton

ROOT = Path(pelton.__file__).parent

#: folder or module of pelton -> what it may import of pelton besides itself.
ALLOWED = {
    "errors": set(),
    "paths": set(),
    "version": set(),
    "config": {"errors"},
    "metrics": set(),
    "outputs": {"metrics"},
    "ledger": set(),
    "graph": set(),
    "nn": {"graph"},
    "models": {"nn", "graph", "errors"},
    "quantize": {"graph", "errors"},
    "passes": {"graph", "quantize", "errors"},
    "program": {"graph", "quantize"},
    "checkpoint": {"graph", "errors"},
    "text": {"errors"},
    "backends": {"graph", "program", "errors", "ledger", "paths", "config", "outputs"},
    "engine": {"backends.base", "config", "errors", "metrics", "outputs"},
    "build": {"backends", "checkpoint", "config", "engine", "errors", "graph", "ledger", "models", "nn", "passes",
              "program", "quantize", "text", "version"},
    "prompts": {"errors"},
    "answers": {"config", "engine", "errors", "metrics", "outputs", "prompts", "text"},
    "async_answers": {"answers", "config", "engine", "errors", "outputs", "prompts"},
    "async_llm": {"answers", "async_answers", "build", "config", "engine", "errors", "llm", "prompts"},
    "llm": {"answers", "build", "config", "engine", "errors", "metrics", "outputs", "prompts"},
    "bench": {"backends", "build", "config", "engine", "errors", "graph", "ledger", "metrics", "nn", "program"},
    "server": {"answers", "async_answers", "backends.base", "build", "config", "engine", "errors", "llm", "metrics",
               "outputs", "prompts", "text", "version"},
    "cli": {"*"},
    "__init__": {"*"},
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """Modules of pelton that ``file`` imports anywhere, as dotted names without the package's."""
    package = ("pelton", *file.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "pelton" else [module]
            found |= {n.removeprefix("pelton.") for n in names if n.startswith("pelton.")}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("pelton.") for a in node.names if a.name.startswith("pelton.")}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_in_the_designs_direction(file: Path) -> None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = ALLOWED[part]
    for module in imports(file):
        top = module.split(".")[0]
        fine = top == part or "*" in allowed or top in allowed or any(module.startswith(a) for a in allowed if "." in a)
        assert fine, f"{part} must not import {module}"


def test_only_the_cuda_backend_and_parallel_may_import_torch() -> None:
    for file in ROOT.rglob("*.py"):
        allowed = {"cuda", "parallel"} & set(file.relative_to(ROOT).parts)
        assert allowed or "import torch" not in file.read_text(), file


def test_import_is_fast_and_light() -> None:
    code = "import sys, pelton; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import pelton"], check=True)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.3


def test_running_a_model_never_imports_torch() -> None:
    code = (
        "import sys, pelton.build, pelton.llm, pelton.models as m; m.architectures(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_passes_and_families_keep_their_budgets() -> None:
    for file in ROOT.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 800, file
    for folder in ("passes", "models"):
        for file in (ROOT / folder).glob("*.py"):
            assert len([x for x in file.read_text().splitlines() if x.strip()]) <= 150, file
