"""What an installed package holds, what importing it costs, and who may know whom."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "desisky_tune"

#: Nothing of these may be loaded to answer `--help`.
SLOW = ("ray", "jax", "astropy", "pandas", "optuna", "equinox", "matplotlib", "scipy", "pyarrow")


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys, json\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "code",
    [
        "import desisky_tune",
        "import desisky_tune.cli",
        "from desisky_tune.cli import main; main(['--help'])",
        "from desisky_tune.cli import main; main(['search', '--help'])",
        "from desisky_tune.cli import main; main(['data', 'simulate', '--help'])",
        "from desisky_tune.cli import main; main(['submit', '--help'])",
    ],
)
def test_help_loads_nothing_slow(code: str) -> None:
    assert not loaded_by(code) & set(SLOW)


def test_the_training_core_loads_no_ray_and_no_optuna() -> None:
    loaded = loaded_by("import desisky_tune.training.program, desisky_tune.io.checkpoint")
    assert not loaded & {"ray", "optuna"}


def test_what_ends_a_run_without_ray_loads_none() -> None:
    """Ray binds every interface where its environment does not stand before it is imported."""
    loaded = loaded_by("import desisky_tune.search.run, desisky_tune.search.study")
    assert "ray" not in loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_whole_of_search_spaces_travels_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    spaces = [path for path in (ROOT / "search_spaces").rglob("*") if path.is_file()]
    assert {"quick.yaml", "broadband.yaml"} <= {path.name for path in spaces}
    for path in spaces:
        name = f"desisky_tune/{path.relative_to(ROOT).as_posix()}"
        assert wheel.read(name) == path.read_bytes()


def test_the_shipped_data_and_their_notice_travel_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    samples = list((PACKAGE / "data" / "sample").iterdir())
    assert {"desi-sv1-exposures.csv", "DESI-LICENSE.rst"} <= {path.name for path in samples}
    for path in samples:
        assert wheel.read(f"desisky_tune/data/sample/{path.name}") == path.read_bytes()


def test_the_native_core_travels_in_the_wheel_as_source(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "desisky_tune" / "training" / "native" / "training.c"
    assert wheel.read("desisky_tune/training/native/training.c") == source.read_bytes()


def test_a_wheel_serves_its_spaces_and_its_data_from_anywhere(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "site")
    script = (
        "import desisky_tune; from desisky_tune.search.space import load_spec;"
        "from desisky_tune.data.features import source_path;"
        "print(desisky_tune.__file__, load_spec('quick').name, load_spec('broadband').name,"
        "source_path('sv1').is_file())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HOME": str(tmp_path)},
    )
    where, *rest = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert rest == ["quick", "broadband", "True"]


def test_a_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "desisky-tune = desisky_tune.cli:program" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert pinned
    assert not [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line)]


def test_every_requirement_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {plain(line.partition("==")[0]) for line in lines if "==" in line}
    assert not [r for r in asked if plain(re.split(r"[\[<>=!~ ]", r)[0]) not in pinned]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_citation_and_package_agree_on_the_version() -> None:
    import yaml

    import desisky_tune

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == desisky_tune.__version__
    assert citation["license"] == "BSD-3-Clause"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


#: Rooms from the outermost to the innermost: each may import those to its right.
ROOMS = ("cli", "jobs", "search", "inference", "visualization", "training", "io", "models", "data")
OUTER = {
    "jobs": {"cli"},
    "search": {"cli", "jobs"},
    "visualization": {"cli", "jobs"},
    "inference": {"cli", "jobs", "search", "visualization"},
    "training": {"cli", "jobs", "search", "visualization", "inference"},
    "io": {"cli", "jobs", "search", "visualization", "inference"},
    "models": {"cli", "jobs", "search", "visualization", "inference"},
    "data": set(ROOMS) - {"data"},
}


@pytest.mark.parametrize("room", OUTER)
def test_imports_point_one_way(room: str) -> None:
    for path in modules():
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") != room:
            continue
        reached = {name.split(".")[1] for name in imports(path) if name.startswith("desisky_tune.")}
        assert not reached & OUTER[room], path


def test_ray_and_optuna_stay_in_their_rooms() -> None:
    for path in modules():
        place = path.relative_to(PACKAGE)
        known = {name.partition(".")[0] for name in imports(path)}
        if place.parts[0] != "search":
            assert "optuna" not in known, path
            if place.parts[0] != "jobs" and str(place) not in ("ray_session.py", "data/source.py"):
                assert "ray" not in known, path


def test_only_the_command_line_prints_and_exits() -> None:
    # The trainer's `print_every` is documented to print; the download draws its bar by rich.
    for path in modules():
        place = path.relative_to(PACKAGE)
        if place.parts[0] == "cli" or place.name in ("__main__.py", "trainer.py"):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {c.func.id for c in calls if isinstance(c.func, ast.Name)}
        assert not names & {"print", "exit", "quit"}, path
