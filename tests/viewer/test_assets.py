"""What the page of the viewer is built to stands in the repository, and is what its sources build to."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

VIEWER = Path(__file__).parents[2] / "viewer"
SOURCES = VIEWER / "web"
ASSETS = VIEWER / "assets"
NAMES_OF_XML = {f"http://www.w3.org/{name}" for name in ("2000/svg", "1999/xhtml", "1998/Math/MathML")}

NO_REGISTRY = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ENETUNREACH", "ETIMEDOUT", "ERR_SOCKET_TIMEOUT")


def test_nothing_is_fetched_from_elsewhere() -> None:
    """The only addresses in what is served are names of XML."""
    for path in ASSETS.iterdir():
        addresses = set(re.findall(r"https?://[\w./-]+", path.read_text()))
        assert addresses <= NAMES_OF_XML, path.name


def test_no_script_stands_in_the_page() -> None:
    page = (ASSETS / "index.html").read_text()
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    assert "style=" not in page and "<style" not in page


def test_the_versions_are_exact_and_of_no_particular_registry() -> None:
    package = json.loads((SOURCES / "package.json").read_text())
    for name, version in {**package["dependencies"], **package["devDependencies"]}.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), (name, version)
    assert '"resolved"' not in (SOURCES / "package-lock.json").read_text()


@pytest.mark.slow
def test_the_assets_are_what_the_sources_build_to(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm: what is built cannot be compared with the sources")
    web = tmp_path / "viewer" / "web"
    shutil.copytree(SOURCES, web, ignore=shutil.ignore_patterns("node_modules"))
    install = subprocess.run([npm, "ci"], cwd=web, capture_output=True, text=True, timeout=200)
    if any(code in install.stderr for code in NO_REGISTRY):
        pytest.skip(f"no registry of npm packages can be reached: {install.stderr[:300]}")
    assert install.returncode == 0, install.stderr
    build = subprocess.run([npm, "run", "build"], cwd=web, capture_output=True, text=True, timeout=200)
    assert build.returncode == 0, build.stdout + build.stderr
    built = {path.name: path.read_bytes() for path in (tmp_path / "viewer" / "assets").iterdir()}
    committed = {path.name: path.read_bytes() for path in ASSETS.iterdir()}
    assert built.keys() == committed.keys()
    changed = [name for name in built if built[name] != committed[name]]
    assert not changed, f"{changed} are not what viewer/web builds to: run npm run build there"
