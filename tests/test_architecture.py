"""The house rules: imports point down, families do not know each other, files stay short, start-up stays light."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(
    p for p in (*ROOT.glob("vlm/**/*.py"), *ROOT.glob("configs/*.py"), ROOT / "train.py", ROOT / "eval.py")
)

# A module may import from its own layer's group and from lower layers only. First match wins.
LAYERS: list[tuple[str, int]] = [
    (r"vlm|vlm\.(demo|predict|tasks|score|capfilt|precompute|loading|initial|dry_run)(\..*)?", 7),
    (r"vlm\.(convert|checkpoint)\.__main__", 7),
    (r"(train|eval|configs)(\..*)?", 7),
    (r"vlm\.evaluation(\..*)?", 6),
    (r"vlm\.(training|experiment|checks|generation)(\..*)?", 5),
    (r"vlm\.(sharding|optimizer|checkpoint|metrics|flops|heap|hosts|padding|preemption|workdir)(\..*)?", 4),
    (r"vlm\.models(\..*)?", 3),
    (r"vlm\.(encoders|fusion|family)(\..*)?", 2),
    (r"vlm\.(layers|losses|data|convert)(\..*)?", 1),
    (r"vlm\.(tree|tokenizers|errors|manifest|config|schema|strict)(\..*)?", 0),
]
FLAX_LINEN = re.compile(r"vlm/(layers|encoders|fusion)/.*|vlm/models/[a-z]+/model\.py|vlm/sharding\.py")
NO_JAX = re.compile(
    r"vlm/(data|tokenizers|evaluation/metrics)/.*|vlm/models/[a-z]+/processor\.py"
    r"|vlm/(errors|manifest|config|schema|strict|score)\.py"
)


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(name: str) -> int:
    for pattern, layer in LAYERS:
        if re.fullmatch(pattern, name):
            return layer
    raise AssertionError(f"{name} belongs to no layer: add it to LAYERS")


def _imports(path: pathlib.Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = _package(path)[: -node.level + 1 or None] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def _package(path: pathlib.Path) -> list[str]:
    """What one leading dot stands for in this file."""
    return list(path.relative_to(ROOT).parent.parts)


def test_relative_imports_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (path := tmp_path / "vlm" / "data" / "x.py").parent.mkdir(parents=True)
    path.write_text(
        "from .. import training\nfrom . import tar\nfrom .tar import Tar\nfrom ..models.blip import model\n"
    )
    expected = {"vlm.training", "vlm.data.tar", "vlm.data.tar.Tar", "vlm.models.blip", "vlm.models.blip.model"}
    assert _imports(path) >= expected


def test_layers_name_modules_that_there_are():
    for pattern, _ in LAYERS:
        for names in re.findall(r"\(([a-z_|]+)\)", pattern):
            for name in names.split("|"):
                assert any(re.fullmatch(rf"(vlm\.)?{name}(\..*)?", module) for module in _modules()), name


def _modules() -> set[str]:
    return {_name(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_down(path):
    name, modules = _name(path), _modules()
    for target in _imports(path) & modules:
        if target in ("vlm", name):
            continue
        assert _layer(target) <= _layer(name), (
            f"{name} (layer {_layer(name)}) imports {target} (layer {_layer(target)})"
        )
        families = [re.match(r"vlm\.models\.(\w+)", n) for n in (name, target)]
        if all(families):
            assert families[0].group(1) == families[1].group(1), f"{name} imports another family: {target}"


def test_no_import_cycles():
    modules = _modules()
    graph = {_name(p): {t for t in _imports(p, top_level_only=True) & modules if t != _name(p)} for p in SOURCES}
    # A package's __init__ runs before its submodules; importing the package from inside it is not a cycle by itself.
    graph = {name: {t for t in targets if not name.startswith(t + ".")} for name, targets in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_frameworks_stay_in_their_places(path):
    relative, imports = path.relative_to(ROOT).as_posix(), _imports(path)
    if not FLAX_LINEN.fullmatch(relative):
        assert not {i for i in imports if i.startswith("flax.linen") or i == "flax.nn"}, (
            f"{relative} imports flax.linen"
        )
    if NO_JAX.fullmatch(relative):
        assert not {i for i in imports if re.match(r"(jax|flax|optax|orbax)\b(?!typing)", i)}, f"{relative} imports jax"
    assert not {i for i in imports if re.match(r"(torch|transformers|tensorflow|cv2)\b", i)}, f"{relative}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_median_file_is_short():
    lengths = sorted(len(path.read_text().splitlines()) for path in SOURCES)
    assert lengths[len(lengths) // 2] <= 150


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_importing_the_package_is_light():
    assert _python("import sys, vlm; print('jax' in sys.modules, 'numpy' in sys.modules)") == "False False"


def test_help_needs_no_jax():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        "print('jax imported:', 'jax' in sys.modules)"
    )
    assert _python(code).endswith("jax imported: False")


def test_the_suite_checks_shapes_and_broadcasts():
    """What tests/conftest.py switches on: annotated shapes, and no silent broadcast over a new axis."""
    import jax.numpy as jnp
    import numpy as np
    from jaxtyping import TypeCheckError

    from vlm.losses import mean_squared_error

    assert mean_squared_error(np.zeros((2, 3)), jnp.zeros((2, 3))) == 0
    with pytest.raises(TypeCheckError, match="mean_squared_error"):
        mean_squared_error(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)
