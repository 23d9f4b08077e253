"""What the trainer could not replay is refused where it is written, with the reason."""

from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize(
    ("key", "value", "neutral"), [("top_p", 0.95, 1.0), ("top_k", 50, -1), ("min_p", 0.05, 0.0)]
)
def test_a_truncated_vocabulary_is_refused(key, value, neutral, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"extends: quickstart\nrollout:\n  sampling: {{{key}: {value}}}\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{recipe}:3: rollout.sampling.{key}: {key} must be {neutral}, got {value}: ")
    assert "the trainer would score the whole vocabulary" in line
    assert (
        getattr(load_config("quickstart", [f"rollout.sampling.{key}={neutral}"]).rollout.sampling, key)
        == neutral
    )


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize("key", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_are_no_options(key):
    with pytest.raises(ConfigError, match=f"unknown key 'rollout.sampling.{key}'"):
        load_config("quickstart", [f"rollout.sampling.{key}=1.1"])
