"""The house's laws about imports: arrows point down, one door per dependency, and importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmkit"

LAYERS = [
    {"errors", "rng", "config", "products"},
    {
        *("models", "heads", "objectives", "initialise", "lora", "tuning", "optim", "schedules", "averaging"),
        *("sampling", "sharding"),
    },
    {
        *("store", "data", "tokenizers", "hf"),
        *("console", "plots", "device", "distributed", "signals", "reporting", "loggers"),
    },
    {"train", "evaluation", "generate", "loading", "session", "horizon", "planning", "tasks"},
    {"commands", "lm_eval"},
    {
        *("cli", "arguments", "keys", "help", "completion", "presets", "runs_line", "sweep", "launch", "explain"),
        "__main__",
    },
]

DOORS = {
    "hydra": {"cli", "launch"},
    "omegaconf": {"cli", "help", "explain"},
    "rich": {"console"},
    "matplotlib": {"plots"},
    "datasets": {"data"},
    "sentencepiece": {"tokenizers"},
    "tokenizers": {"tokenizers"},
    "safetensors": {"hf"},
    "transformers": {"hf"},
    "gguf": {"hf"},
    "lm_eval": {"lm_eval"},
    "onnx": {"hf"},
    "onnxruntime": {"hf"},
    "huggingface_hub": {"hf", "data"},
    "filelock": {"store", "data"},
    "tensorboard": {"loggers"},
    "wandb": {"loggers"},
    "mlflow": {"loggers"},
    "trackio": {"loggers"},
    "nltk": {"evaluation"},
    "torch.distributed": {"distributed", "sharding"},
}

FORBIDDEN_NAMES = {"eval", "exec", "__import__", "instantiate"}
FORBIDDEN_MODULES = {"pickle", "shelve", "marshal", "dill"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The name by which the tables know a module: its top-level module or subpackage in lmkit."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, except under ``if TYPE_CHECKING``."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "lmkit":
                found.update(f"lmkit.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return
    level = next((i for i, layer in enumerate(LAYERS) if unit in layer), None)
    assert level is not None, f"{unit} has no layer: add it to LAYERS"
    builds = {"models"} if unit == "config" else set()  # ModelConfig.build imports its family when it is called
    for name in imports(path):
        if name.startswith("lmkit."):
            target = name.split(".")[1]
            above = set().union(*LAYERS[level + 1 :]) - builds
            assert target not in above, f"{unit} (layer {level}) imports {name} from above it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_library_has_one_door(path: Path) -> None:
    for name in imports(path):
        for door, units in DOORS.items():
            assert not f"{name}.".startswith(f"{door}.") or unit_of(path) in units, f"{path.name} imports {door}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_can_run_code_from_a_file(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_NAMES, f"{path.name}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{path.name}:{node.lineno} calls torch.load"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            raise AssertionError(f"{path.name}:{node.value.lineno} passes shell=")


@pytest.mark.parametrize(
    "code", ["import lmkit", "import lmkit.cli; lmkit.cli.main(['--help'])", "import lmkit.config"]
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    heavy = ["torch", "datasets", "hydra", "omegaconf", "rich", "sentencepiece", "tokenizers", "numpy", "matplotlib"]
    script = f"{code}\nimport sys\nprint('\\nloaded:', [m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")


def test_every_public_name_is_there() -> None:
    import lmkit

    assert {name for name in lmkit.__all__ if getattr(lmkit, name, None) is None} == set()
