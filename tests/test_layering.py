"""Who may import whom, and what must not be loaded before it is needed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HOME = {  # package -> the folder it lives in
    "ltx_engines": "engines/ltx_engines",
    "ltx_ref": "ltx_ref",
    "ltx_export": "export/ltx_export",
    "ltx_trt": "runtime/ltx_trt",
}

MAY_IMPORT: dict[str, set[str]] = {
    "ltx_engines": set(),
    "ltx_ref": set(),
    "ltx_export": {"ltx_engines", "ltx_ref"},
    "ltx_trt": {"ltx_engines", "ltx_ref"},
}

TORCH_FREE_OF_REF = {"checkpoint", "quantization", "casts", "codes", "lora", "lora_file"}
"""What of ltx_ref the runtime may import: what files and formats are, in numpy."""

LAZILY = {  # file -> what of ours it may import too, but only inside a function
    "runtime/ltx_trt/session/torch_session.py": {"ltx_ref", "torch"},
    "engines/ltx_engines/perceptual.py": {"torch", "torchvision"},  # LPIPS, where it is at hand
}

SHELVES = {"export", "runtime", "engines", "tools", "tests"}

TORCH = {"torch", "torchvision", "transformers", "diffusers", "accelerate"}
TORCH_FREE = {"ltx_engines", "ltx_trt"}

ORIGINALS = {"ltx_video", "ltx_core", "ltx_pipelines", "diffusers"}
"""What the tests compare with. A package that imported it would be compared with itself."""

LIGHT_AT_IMPORT = {  # module -> what it may import at module level beside the standard library
    "ltx_engines": set[str](),
    "ltx_export.cli": {"typer", "rich"},
    "ltx_trt.cli": {"typer", "rich"},
}

HEAVY_ON_PURPOSE = {
    "engines/ltx_engines/bundle.py": "manifests are pydantic models; commands import it late",
    "engines/ltx_engines/cache_key.py": "part of a manifest",
    "engines/ltx_engines/defaults.py": "part of a manifest",
    "engines/ltx_engines/engine_entry.py": "part of a manifest",
    "engines/ltx_engines/file_entry.py": "part of a manifest",
    "engines/ltx_engines/manifest.py": "pydantic models",
    "engines/ltx_engines/metrics.py": "arithmetic in numpy; commands import it late",
    "engines/ltx_engines/perceptual.py": "it measures numpy's arrays; commands import it late",
    "engines/ltx_engines/pipeline_config.py": "it reads YAML; commands import it late",
    "engines/ltx_engines/strict.py": "it words pydantic's refusals; only readers import it",
}

HEAVY = {
    *TORCH,
    *ORIGINALS,
    *("numpy", "scipy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "safetensors"),
    *("av", "PIL", "tokenizers", "huggingface_hub", "yaml", "pydantic", "platformdirs"),
}


def imported(source: str, *, top_level_only: bool) -> set[str]:
    """The first names of everything that is imported, also by name at run time."""
    nodes = _at_import(ast.parse(source)) if top_level_only else ast.walk(ast.parse(source))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function, no `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _at_import(child)


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / HOME[package]).rglob("*.py"))
    assert files, f"{HOME[package]} is empty; did it move?"
    return files


def files_of_module(module: str) -> list[Path]:
    package, _, leaf = module.partition(".")
    if not leaf:
        return files_of(package)
    file = ROOT / HOME[package] / f"{leaf}.py"
    assert file.is_file(), f"{file} is not there; did it move?"
    return [file]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", HOME)
def test_each_package_imports_only_its_neighbours(package: str) -> None:
    for file in files_of(package):
        source = file.read_text(encoding="utf-8")
        ours = imported(source, top_level_only=False) & set(HOME) - {package}
        allowed = MAY_IMPORT[package] | LAZILY.get(relative(file), set())
        assert ours <= allowed, f"{relative(file)} imports {ours - allowed}"


@pytest.mark.parametrize("package", HOME)
def test_nobody_imports_a_shelf(package: str) -> None:
    for file in files_of(package):
        shelves = imported(file.read_text(encoding="utf-8"), top_level_only=False) & SHELVES
        assert not shelves, f"{relative(file)} imports a folder, not a package: {shelves}"


@pytest.mark.parametrize("package", HOME)
def test_nobody_imports_what_we_are_compared_with(package: str) -> None:
    for file in files_of(package):
        theirs = imported(file.read_text(encoding="utf-8"), top_level_only=False) & ORIGINALS
        assert not theirs, f"{relative(file)} imports {theirs}"


@pytest.mark.parametrize("package", sorted(TORCH_FREE))
def test_what_runs_on_a_users_machine_needs_no_torch(package: str) -> None:
    for file in files_of(package):
        source = file.read_text(encoding="utf-8")
        lazily = LAZILY.get(relative(file), set())
        torch = imported(source, top_level_only=False) & TORCH - lazily
        early = imported(source, top_level_only=True) & lazily
        assert not torch, f"{relative(file)} imports {torch}"
        assert not early, f"{relative(file)} imports {early} on import; move it into the function"


def of_ref(source: str) -> set[str]:
    """The modules of ltx_ref that are imported."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ltx_ref":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or ""] if module else [alias.name for alias in node.names]
            found |= {name.removeprefix("ltx_ref.") for name in names if name[:8] == "ltx_ref."}
    return found


def test_the_runtime_and_what_it_reads_of_the_reference_need_no_torch() -> None:
    readers = [file for file in files_of("ltx_trt") if relative(file) not in LAZILY]
    readers += [ROOT / HOME["ltx_ref"] / f"{name}.py" for name in sorted(TORCH_FREE_OF_REF)]
    for file in readers:
        source = file.read_text(encoding="utf-8")
        assert of_ref(source) <= TORCH_FREE_OF_REF, f"{relative(file)} imports {of_ref(source)}"
        assert not imported(source, top_level_only=True) & TORCH, f"{relative(file)} loads torch"
    assert any(of_ref(file.read_text(encoding="utf-8")) for file in readers)


def test_no_module_of_the_runtime_loads_torch() -> None:
    """In a fresh process, with all of ours that it imports."""
    files = [file for file in files_of("ltx_trt") if relative(file) not in LAZILY]
    home = ROOT / HOME["ltx_trt"]
    names = [f.relative_to(home.parent).with_suffix("").as_posix().replace("/", ".") for f in files]
    names = [name.removesuffix(".__init__") for name in names]
    code = f"import sys, {', '.join(names)}; print(*({TORCH!r} & set(sys.modules)))"
    path = os.pathsep.join(str((ROOT / home).parent) for home in HOME.values())
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", sorted(LIGHT_AT_IMPORT))
def test_light_modules_stay_light(module: str) -> None:
    allowed = LIGHT_AT_IMPORT[module] | sys.stdlib_module_names | set(HOME)
    for file in files_of_module(module):
        if relative(file) in HEAVY_ON_PURPOSE:
            continue
        heavy = imported(file.read_text(encoding="utf-8"), top_level_only=True) - allowed
        assert not heavy, f"{relative(file)} imports {heavy} on import; move it into the function"


@pytest.mark.parametrize("module", sorted(LIGHT_AT_IMPORT))
def test_nothing_heavy_is_loaded_on_the_way(module: str) -> None:
    """In a fresh process: a light module must not import one of ours that is heavy."""
    package = module.partition(".")[0]
    light = [file for file in files_of_module(module) if relative(file) not in HEAVY_ON_PURPOSE]
    names = [f"{package}.{f.stem}" if f.stem != "__init__" else package for f in light]
    code = f"import sys, {', '.join(names)}; print(*(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    path = os.pathsep.join(str((ROOT / home).parent) for home in HOME.values())
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing {module} loads {done.stdout.split()}"


@pytest.mark.parametrize("file", sorted({*HEAVY_ON_PURPOSE}))
def test_an_exception_to_lightness_is_still_needed(file: str) -> None:
    assert imported((ROOT / file).read_text(encoding="utf-8"), top_level_only=True) & HEAVY


SAMPLE = """
import os.path
from typing import TYPE_CHECKING
from . import sibling
try:
    import numpy as np
except ImportError:
    pass
if TYPE_CHECKING:
    import onnx
class Reader:
    from yaml import load
    def read(self):
        from ltx_ref.text import load_text_encoder
        importlib.import_module("torch.nn")
"""


def test_the_reader_of_imports_sees_what_python_would_run() -> None:
    early = {"os", "typing", "numpy", "yaml"}
    assert imported(SAMPLE, top_level_only=True) == early
    assert imported(SAMPLE, top_level_only=False) == early | {"onnx", "ltx_ref", "torch"}
