"""The house's laws about imports: arrows point down, one door per dependency, and importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmkit"

LAYERS = [
    {"errors", "rng", "config", "products", "ids", "pages"},
    {
        *(
            "models",
            "heads",
            "objectives",
            "initialise",
            "lora",
            "tuning",
            "optim",
            "revocable",
            "schedules",
            "averaging",
        ),
        *("sampling", "sharding"),
    },
    {
        *("store", "data", "tokenizers", "hf"),
        *("console", "plots", "device", "distributed", "signals", "reporting", "loggers"),
    },
    {
        *("train", "tasks", "session", "due", "window", "horizon", "timing", "judging", "snapshots"),
        *("evaluation", "generate", "loading", "memory", "planning"),
    },
    {"commands", "lm_eval"},
    {
        *("cli", "arguments", "keys", "help", "completion", "presets", "runs_line", "sweep", "launch", "explain"),
        *("__main__", "composing", "requirements"),
    },
]

DOORS = {
    "hydra": {"composing", "launch"},
    "omegaconf": {"composing", "help"},
    "rich": {"console"},
    "matplotlib": {"plots"},
    "datasets": {"data"},
    "sentencepiece": {"tokenizers"},
    "tokenizers": {"tokenizers"},
    "safetensors": {"hf"},
    "transformers": {"hf"},
    "gguf": {"hf"},
    "lm_eval": {"lm_eval"},
    "onnxruntime": {"hf"},
    "huggingface_hub": {"hf", "data"},
    "filelock": {"store", "data"},
    "packaging": {"requirements"},
    "torch.utils.tensorboard": {"loggers"},
    "wandb": {"loggers"},
    "mlflow": {"loggers"},
    "trackio": {"loggers"},
    "nltk": {"evaluation"},
    "platformdirs": {"store"},
    "psutil": {"device", "memory", "store"},
    "schedulefree": {"optim"},
    "torch.distributed": {"distributed", "sharding"},
    "tqdm": {"lm_eval"},
    "zstandard": {"data"},
}
EVERYWHERE = {"lmkit", "torch", "numpy", *sys.stdlib_module_names}

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "instantiate"}
FORBIDDEN_CALLS = {"torch.load", "os.system", "os.popen", *(f"builtins.{name}" for name in FORBIDDEN_NAMES)}
FORBIDDEN_MODULES = {"pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "torch.load"}


SCRIPTS = sorted((PACKAGE.parent / "scripts").glob("*.py"))


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The name by which the tables know a module: its top-level module or subpackage in lmkit."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, with what is taken from it, except under ``if TYPE_CHECKING``."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
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
        doors = [door for door in DOORS if f"{name}.".startswith(f"{door}.")]
        assert doors or name.partition(".")[0] in EVERYWHERE, f"{path.name} imports {name}: add its door to DOORS"
        assert all(unit_of(path) in DOORS[door] for door in doors), f"{path.name} imports {name}"


def test_the_tables_name_what_there_is() -> None:
    assert set().union(*LAYERS) == {unit_of(path) for path in modules()} - {"__init__"}
    used = {
        (door, unit_of(path))
        for path in modules()
        for name in imports(path)
        for door in DOORS
        if f"{name}.".startswith(f"{door}.")
    }
    assert used == {(door, unit) for door, units in DOORS.items() for unit in units}


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def ways_to_run_code(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that came with data, with its line."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        found = [name for name in found if {name, name.split(".")[0]} & (FORBIDDEN_MODULES | FORBIDDEN_CALLS)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_CALLS:
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle") and not is_false(node.value):
            found.append(f"{node.arg}=")
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in found)


@pytest.mark.parametrize("path", [*modules(), *SCRIPTS], ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_nothing_can_run_code_from_a_file(path: Path) -> None:
    assert list(ways_to_run_code(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.externals",
        "from torch import load",
        "torch.load(path)",
        "read = torch.load",
        "eval(text)",
        "builtins.exec(text)",
        "from builtins import exec",
        "instantiate(config)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_ways_to_run_code_are_found(code: str) -> None:
    assert list(ways_to_run_code(ast.parse(code)))


def test_what_only_looks_like_one_is_not_found() -> None:
    fine = "model.eval(); torch.compile(model); re.compile(text); import torch; np.load(path, allow_pickle=False)"
    assert list(ways_to_run_code(ast.parse(fine))) == []


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
