"""Every option has a reader: one that nothing reads would be set, and do nothing."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from polyturn.configs.loading.loader import find_shipped, load_config, shipped_names
from polyturn.configs.schema.run import EvaluationConfig
from tests.support import option_readers
from tests.support.option_readers import Readers, all_sections


def unread() -> list[str]:
    readers = Readers()
    return sorted(
        f"{section.__name__}.{name}"
        for section in all_sections()
        for name in section.model_fields
        if name != "kind"
        and not any(issubclass(section, reader) and name == read for reader, read in readers.read)
    )


def test_every_option_is_read() -> None:
    assert unread() == []


def test_a_reader_of_another_section_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`every_steps` of the checkpoints is not that of the evaluation, whatever a variable is called."""
    (tmp_path / "trainer").mkdir()
    module = tmp_path / "trainer" / "module.py"
    monkeypatch.setattr(option_readers, "ROOT", tmp_path)
    module.write_text(
        textwrap.dedent("""
        def due(config: RunConfig, step: int) -> bool:
            settings = config.checkpoint
            return step % settings.every_steps == 0
        """)
    )
    assert "EvaluationConfig.every_steps" in unread() and "CheckpointConfig.every_steps" not in unread()
    module.write_text(
        textwrap.dedent("""
        class Loop:
            def __init__(self, config: RunConfig) -> None:
                self._config = config

            def due(self, step: int) -> bool:
                every = self._config.evaluation.every_steps
                return bool(every) and step % every == 0
        """)
    )
    assert (EvaluationConfig, "every_steps") in Readers().read


@pytest.mark.parametrize("name", shipped_names("recipe"))
def test_every_shipped_recipe_says_what_it_comes_to(name: str) -> None:
    """Nothing that a recipe sets is lost on the way: each of its own keys has the value that it writes."""
    config = load_config(name).model_dump(mode="json")
    text = find_shipped("recipe", name).read_text()
    written = option_readers.written_values(text)
    assert written
    for path, value in written.items():
        found = config
        for key in path.split("."):
            found = found[key]
        assert holds(found, value), path


def holds(found: object, written: object) -> bool:
    """Whether what was written is there; the rows of a list have defaults beside it."""
    if isinstance(written, list) and isinstance(found, list):
        return len(found) == len(written) and all(map(holds, found, written))
    if isinstance(written, dict) and isinstance(found, dict):
        return all(key in found and holds(found[key], value) for key, value in written.items())
    return found == written
