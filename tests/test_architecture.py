"""The package's shape: light imports, and imports that only run downwards."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import polyturn

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "tools", "envs", "agents", "rollout", "trainer", "viewer")
WEB_SOURCES = ROOT / "viewer" / "web"
"""What the page in `viewer/assets` is built from; it is in the repository alone."""
HEAVY = ("torch", "ray", "sglang", "sglang_router", "megatron", "transformers")


@pytest.mark.parametrize(
    "module",
    [
        "polyturn",
        "polyturn.cli.main",
        "polyturn.configs.loading.loader",
        "polyturn.configs.loading.upstream",
        "polyturn.tools.search.bm25",
        "polyturn.tools.toolset",
        "polyturn.envs",
        "polyturn.agents",
        "polyturn.trainer.run.preflight",
    ],
)
def test_light_import(module: str) -> None:
    program = f"import {module}, sys; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_rank_imports_nothing_of_the_driver() -> None:
    pytest.importorskip("polyturn.trainer.megatron", reason="training is not installed")
    program = (
        "import sys, polyturn.trainer.ranks.rank, polyturn.trainer.megatron.policy, polyturn.trainer.megatron.critic;"
        "print(*(name for name in sys.modules if name.startswith('polyturn.trainer')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    of_the_driver = ("polyturn.trainer.run", "polyturn.trainer.credit", "polyturn.trainer.ranks.trainer")
    assert [name for name in done.stdout.split() if name.startswith(of_the_driver)] == []


def test_the_vocabulary_brings_nothing_with_it() -> None:
    program = (
        "import sys; from polyturn.envs.messages import Message;"
        "print(*(name for name in sys.modules if name.partition('.')[0] in ('polyturn', 'gymnasium', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {
        "polyturn",
        "polyturn.envs",
        "polyturn.envs.builtin",
        "polyturn.envs.messages",
        "polyturn.tools",
        "polyturn.tools.plain",
        "polyturn.tools.types",
        "polyturn.version",
    }


@pytest.mark.parametrize(
    "program",
    [
        "import polyturn, gymnasium; env = gymnasium.make('polyturn/TwoHopSearch-v0')",
        "import gymnasium, polyturn; env = gymnasium.make('polyturn/TwoHopSearch-v0')",
        "import gymnasium, polyturn.envs; env = gymnasium.make('polyturn/TwoHopSearch-v0')",
        "import gymnasium; env = gymnasium.make('polyturn:polyturn/TwoHopSearch-v0')",
        "import polyturn; env = polyturn.make('polyturn/TwoHopSearch-v0')",
    ],
)
def test_gymnasium_knows_the_built_in_environments_in_whichever_order(program: str) -> None:
    program += "; print(env.spec.id)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["polyturn/TwoHopSearch-v0"]


def test_public_names_are_light_and_there() -> None:
    program = (
        "import sys, polyturn;"
        "[getattr(polyturn, name) for name in polyturn.__all__];"
        "assert set(polyturn.__all__) <= set(dir(polyturn));"
        "assert polyturn.list_environments();"
        f"print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package as a wheel that was made from an sdist installs it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("src", *FOLDERS):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "node_modules"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("built")
    sdist = tmp_path_factory.mktemp("sdist")
    program = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(sdist)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=source, capture_output=True)
    (archive,) = sdist.iterdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-build-isolation", "--target", str(target), str(archive)]
    subprocess.run(install, check=True)
    yield target
    shutil.rmtree(target)


def test_an_upward_import_would_be_found(tmp_path: Path) -> None:
    """`make lint` holds the contract; here it is seen to bite, on a package of the same layers."""
    for name in ("", *FOLDERS, "cli"):
        package = tmp_path / "polyturn" / name
        package.mkdir()
        (package / "__init__.py").touch()
    (tmp_path / "polyturn" / "configs" / "planted.py").write_text("import polyturn.envs\n")
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(program), "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "polyturn.configs.planted -> polyturn.envs" in done.stdout


def test_every_folder_of_code_and_data_is_in_the_sdist_and_the_wheel(built: Path) -> None:
    """A file that the package data does not name would be there in an editable install only."""
    for path in (ROOT / "src" / "polyturn" / "cli").rglob("*.tmpl"):
        assert (built / "polyturn" / "cli" / path.relative_to(ROOT / "src" / "polyturn" / "cli")).is_file()
    for name in FOLDERS:
        for path in (ROOT / name).rglob("*"):
            if (
                path.suffix
                in (".py", ".yaml", ".jinja", ".json", ".safetensors", ".tmpl", ".html", ".js", ".css")
                and "__pycache__" not in path.parts
                and WEB_SOURCES not in path.parents
            ):
                inside = built / "polyturn" / name / path.relative_to(ROOT / name)
                assert inside.is_file(), f"{path} is not installed"


def test_editors_can_follow_imports() -> None:
    """The path of a module is plain: found from the folder `src` without an import hook."""
    found = importlib.machinery.PathFinder.find_spec("polyturn", [str(ROOT / "src")])
    assert found is not None and found.submodule_search_locations is not None
    inside = importlib.machinery.PathFinder.find_spec("envs", list(found.submodule_search_locations))
    assert inside is not None and inside.origin is not None
    assert Path(inside.origin).samefile(ROOT / "envs" / "__init__.py")


def test_editors_know_the_public_names() -> None:
    """What is loaded when it is used is written down a second time, for editors and type checkers."""
    (block,) = (
        node
        for node in ast.parse((ROOT / "src/polyturn/__init__.py").read_text()).body
        if isinstance(node, ast.If)
    )
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == polyturn._HOME_OF
    assert set(polyturn.__all__) == {*told, "__version__"}


@pytest.mark.parametrize("name", ["polyturn.ToolEnv", "polyturn.envs.tool_env.ToolEnv"])
def test_an_editor_goes_to_the_definition(name: str) -> None:
    jedi = pytest.importorskip("jedi")
    script = jedi.Script(f"import polyturn.envs.tool_env\n{name}", project=jedi.Project(ROOT / "src"))
    (found,) = script.goto(2, len(name), follow_imports=True)
    assert (found.full_name, found.type) == ("polyturn.envs.tool_env.ToolEnv", "class")


def product_modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    package = ROOT / "src" / "polyturn"
    for folder in (package, *(ROOT / name for name in FOLDERS)):
        prefix = () if folder == package else (folder.name,)
        for path in folder.rglob("*.py"):
            parts = ("polyturn", *prefix, *path.relative_to(folder).with_suffix("").parts)
            if folder != package or len(parts) < 3 or parts[1] not in FOLDERS:
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


@dataclass(frozen=True)
class Import:
    target: str
    """A dotted name: a module, or something in one."""
    line: int
    is_late: bool
    """Whether it runs with a function and not with the module."""
    is_checked_only: bool
    """Whether it stands under `if TYPE_CHECKING`."""


def imports_in(source: str, *, package: str) -> list[Import]:
    """All imports of a module that lies in `package`, in the order of their lines."""
    found: list[Import] = []

    def visit(node: ast.AST, late: bool, checked: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, late, checked) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join(filter(None, [*above, node.module]))
            found.extend(Import(f"{module}.{alias.name}", node.lineno, late, checked) for alias in node.names)
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        checked = checked or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, late, checked)

    visit(ast.parse(source), False, False)
    return found


def imports_of(path: Path, name: str) -> list[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports_in(path.read_text(encoding="utf-8"), package=package)


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a\nif TYPE_CHECKING:\n    from b import c\ndef f():\n    import d.e\nfrom ..g import h\n"
    assert imports_in(source, package="x.y.z") == [
        Import("a", 1, False, False),
        Import("b.c", 3, False, True),
        Import("d.e", 5, True, False),
        Import("x.y.g.h", 6, False, False),
    ]


def own_module(target: str, modules: Mapping[str, Path]) -> str | None:
    """The module of ours that an import names."""
    parent = target.rpartition(".")[0]
    return target if target in modules else parent if parent in modules else None


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers and inside functions count: they only hide a circle."""
    modules = product_modules()
    graph = {
        name: {
            found
            for one in imports_of(path, name)
            if (found := own_module(one.target, modules)) not in (None, name)
        }
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


IMPORTED_LATE = {
    (
        "polyturn.envs.code.harness.solution",
        "polyturn.envs.code.harness.tests",
    ): "tests stay out of its memory",
    (
        "polyturn.tools.children",
        "polyturn.tools.threads",
    ): "some children import it for `end_with` and are small",
    (
        "polyturn.trainer.megatron.layers",
        None,
    ): "Transformer Engine, which Megatron imports there, is optional",
}
"""Imports inside functions with another reason than a package that is large or optional."""


def test_an_import_inside_a_function_spares_a_package() -> None:
    """It brings a package from elsewhere that the module itself does not need; else it belongs at the top."""
    modules = product_modules()
    imports = {name: imports_of(path, name) for name, path in modules.items()}

    @functools.cache
    def needs(name: str) -> frozenset[str]:
        """The packages from elsewhere that are imported with a module of ours."""
        seen, left, packages = set(), [name], set()
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            left.extend(filter(None, [name.rpartition(".")[0]]))
            for one in imports[name]:
                if one.is_late or one.is_checked_only:
                    continue
                own = own_module(one.target, modules)
                if own is None:
                    packages.add(one.target.partition(".")[0])
                else:
                    left.append(own)
        return frozenset(packages - sys.stdlib_module_names)

    unreasoned = []
    for name in modules:
        for one in imports[name]:
            own = own_module(one.target, modules)
            package = one.target.partition(".")[0]
            if one.is_late and (name, own) not in IMPORTED_LATE and package not in sys.stdlib_module_names:
                brought = {package} if own is None else needs(own)
                if brought <= needs(name):
                    unreasoned.append(f"{name}:{one.line} {one.target}")
    assert not unreasoned, "\n".join(unreasoned)


def test_long_modules_say_why() -> None:
    """One idea a module; over 500 lines its docstring gives the reason in a sentence with the word "long"."""
    unexplained = []
    for folder in ("src/polyturn/cli", *FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            docstring = ast.get_docstring(ast.parse(text)) or ""
            if len(text.splitlines()) > 500 and "long" not in docstring.lower():
                unexplained.append(str(path.relative_to(ROOT)))
    assert not unexplained
