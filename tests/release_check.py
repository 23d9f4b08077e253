"""What is checked before a release: a wheel and an sdist of the last commit, each in an empty environment, run it.

Takes an index of packages, 8 GB of disk and some minutes; `make release-check` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (
    "train quickstart trainer.num_steps=2 rollout.prompts_per_step=4 rollout.samples_per_prompt=4 "
    "trainer.global_batch_size=16 evaluation.num_tasks=8 run_dir=run"
)
COMMANDS = ("--version", TRAIN, "eval run smoke --policy oracle", "sft --help", "env list", "models list")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: release_check.py --kinds wheel")
    parser.add_argument("--kinds", nargs="+", choices=("wheel", "sdist"), default=["wheel", "sdist"])
    return parser.parse_args()


def run(*command: str, folder: Path, **more: str) -> str:
    """What a command prints that must succeed, outside the repository and without its path."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(command, cwd=folder, env=kept | more, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def check_changelog(version: str) -> None:
    """Exit unless the changelog has an entry for the version."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        sys.exit(f"CHANGELOG.md has no entry `## {version}`")


def build(kind: str, source: Path, target: Path) -> Path:
    """The one file that the build backend makes of the source."""
    program = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", program, folder=source)
    (built,) = target.iterdir()
    return built


def check(kind: str, built: Path, version: str, folder: Path) -> dict[str, float]:
    """Seconds of each command in a new environment that the built file was installed in."""
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", "venv", folder=folder)
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    run(*pip, "-r", str(ROOT / "requirements" / "cpu.lock"), folder=folder)
    run(*pip, "--no-build-isolation", str(built), folder=folder)
    seconds["install"] = time.perf_counter() - started
    away = folder / "away"
    away.mkdir()
    where = run(str(python), "-c", "import polyturn; print(polyturn.__file__)", folder=away).strip()
    if not Path(where).is_relative_to(folder / "venv"):
        sys.exit(f"{kind}: polyturn was imported from {where}")
    for command in COMMANDS:
        started = time.perf_counter()
        printed = run(str(folder / "venv" / "bin" / "polyturn"), *command.split(), folder=away)
        seconds[" ".join(command.split()[:3])] = time.perf_counter() - started
        if command == "--version" and printed != f"polyturn {version}\n":
            sys.exit(f"{kind}: `polyturn --version` prints {printed!r}, not {version}")
    rows = (away / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if not any(json.loads(row).get("step") == 2 for row in rows):
        sys.exit(f"{kind}: the demo has not come to its second step")
    return seconds


def main() -> None:
    arguments = parse_arguments()
    version = re.findall(r'__version__ = "(.+)"', (ROOT / "src/polyturn/version.py").read_text())[0]
    check_changelog(version)
    found = {}
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for part in ("source", "built"):
                (folder / part).mkdir()
            run("git", "archive", "--output", str(folder / "source.tar"), "HEAD", folder=ROOT)
            with tarfile.open(folder / "source.tar") as archive:
                archive.extractall(folder / "source", filter="fully_trusted")
            built = build(kind, folder / "source", folder / "built")
            if version not in built.name:
                sys.exit(f"{built.name} is not of version {version}")
            found[kind] = check(kind, built, version, folder)
            print(f"{built.name}, {built.stat().st_size / 1e6:.1f} MB: installed, and the demo ran")
            for what, seconds in found[kind].items():
                print(f"  {what:<30} {seconds:>7.1f} s")
    print(json.dumps({"release_check": version, "seconds": found}))


if __name__ == "__main__":
    main()
