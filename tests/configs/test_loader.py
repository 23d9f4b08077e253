"""The loader: layers, overrides, kinds, and where an error points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading import loader, yaml_tree
from polyturn.configs.loading.loader import dump_config, json_schema, load_config
from polyturn.configs.loading.validation import field_paths
from polyturn.configs.schema.objective import KLInLoss, NoKL
from polyturn.configs.schema.run import RunConfig, Section
from polyturn.configs.schema.tasks import (
    EnvironmentReward,
    RubricPart,
    RubricReward,
    RuleReward,
    TaskSourceConfig,
)
from polyturn.configs.schema.weight_sync import DiskSync

MINIMAL = """\
name: small
environment: {id: polyturn/TwoHopSearch-v0}
model: {path: builtin:tiny-searcher}
rollout: {prompts_per_step: 2, samples_per_prompt: 4}
trainer:
  num_steps: 1
  global_batch_size: 8
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes files into an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return _write


def load_minimal(write: Any, *overrides: str) -> RunConfig:
    return load_config(write(MINIMAL), overrides)


def complaint(recipe: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


def test_quickstart_is_found_by_name_and_by_path() -> None:
    by_name = load_config("quickstart")
    assert by_name == load_config(loader.CONFIGS_DIRECTORY / "recipes" / "quickstart" / "quickstart.yaml")
    assert by_name == load_config("quickstart.yaml")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-6", 1e-6), ("1.5E+3", 1500.0), (".5", 0.5), ("3", 3.0), ("1_000.5", 1000.5)],
)
def test_numbers_are_numbers_in_files_and_overrides(write: Any, written: str, value: float) -> None:
    recipe = write(MINIMAL + f"  optimizer: {{learning_rate: {written}}}\n")
    assert load_config(recipe).trainer.optimizer.learning_rate == value
    recipe = write(MINIMAL)
    override = f"trainer.optimizer.learning_rate={written}"
    assert load_config(recipe, [override]).trainer.optimizer.learning_rate == value


def test_text_fields_take_an_override_as_it_was_written(write: Any) -> None:
    recipe = write(MINIMAL)
    config = load_config(recipe, ["name=0010", "output_dir=2024", "run_dir=null"])
    assert (config.name, config.output_dir, config.run_dir) == ("0010", Path("2024"), None)


def test_free_sections_keep_the_types_of_their_values(write: Any) -> None:
    options = "{a: 1e-3, b: 7, c: yes, d: true, e: '1e-3', f: [1, x], g: null}"
    recipe = write(MINIMAL.replace("Search-v0}", f"Search-v0, options: {options}}}"))
    expected = {"a": 1e-3, "b": 7, "c": "yes", "d": True, "e": "1e-3", "f": [1, "x"], "g": None}
    got = load_config(recipe).environment.options
    assert got == expected
    assert {key: type(value) for key, value in got.items()} == {k: type(v) for k, v in expected.items()}


def test_unknown_key_points_to_its_line_and_to_the_nearest_key(write: Any) -> None:
    recipe = write(MINIMAL + "  optimizer:\n    lerning_rate: 1e-6\n")
    assert complaint(recipe) == (
        "recipe.yaml:9: unknown key 'trainer.optimizer.lerning_rate', "
        "did you mean 'trainer.optimizer.learning_rate'?"
    )
    recipe = write(MINIMAL)
    assert complaint(recipe, "environment.max_turn=3") == (
        "command line: unknown key 'environment.max_turn', did you mean 'environment.max_turns'?"
    )


def test_a_key_that_lives_elsewhere_is_found_there(write: Any) -> None:
    message = complaint(write(MINIMAL), "learning_rate=1e-6")
    assert message.endswith("did you mean 'trainer.optimizer.learning_rate'?")
    assert complaint(write(MINIMAL), "env.id=x").endswith("did you mean 'environment'?")


def test_a_key_of_another_kind_says_which_kind_has_it(write: Any) -> None:
    message = complaint(write(MINIMAL), "trainer.algorithm.kl.coefficient=0.1")
    assert "for kind 'none'; kind 'in_loss' has it" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: abc", "recipe.yaml:8: 'seed' must be an integer, got 'abc'"),
        ("seed: 1.5", "recipe.yaml:8: 'seed' must be an integer, got 1.5"),
        ("seed: true", "recipe.yaml:8: 'seed' must be an integer, got true"),
        ("seed: -1", "recipe.yaml:8: 'seed' must be a value of at least 0, got -1"),
        ("resume: yes", "recipe.yaml:8: 'resume' must be true or false, got 'yes'"),
        ("resume: 1", "recipe.yaml:8: 'resume' must be true or false, got 1"),
        ("checks: on", "recipe.yaml:8: 'checks' must be a section (`key: value` lines), got 'on'"),
        ("sglang: [1]", "recipe.yaml:8: 'sglang' must be a section (`key: value` lines), got a list"),
        ("output_dir: 5", "recipe.yaml:8: 'output_dir' must be text, got 5; write \"5\" in quotes"),
        (
            "engines: {device: gpu}",
            "recipe.yaml:8: 'engines.device' must be one of 'cpu' or 'cuda', got 'gpu', did you mean 'cpu'?",
        ),
        (
            "weight_sync: {kind: disc}",
            "recipe.yaml:8: 'weight_sync.kind' must be one of 'broadcast', 'tensors', 'delta', 'disk', 'adapter', "
            "got 'disc', did you mean 'disk'?",
        ),
        (
            "weight_sync: {kind: disk, directory: 3}",
            "recipe.yaml:8: 'weight_sync.directory' must be text, got 3; write \"3\" in quotes",
        ),
        (
            "evaluation: {temperature: .nan}",
            "recipe.yaml:8: 'evaluation.temperature' must be a finite number, got nan",
        ),
    ],
)
def test_a_wrong_value_says_where_what_and_what_is_right(write: Any, line: str, message: str) -> None:
    assert complaint(write(MINIMAL + line + "\n")) == message


def test_every_fault_of_a_file_is_told_at_once(write: Any) -> None:
    message = complaint(write(MINIMAL + "seed: x\nresume: 3\n"))
    assert [line.split(":")[1] for line in message.splitlines()] == ["8", "9"]


def test_a_missing_key_is_named_with_its_meaning(write: Any) -> None:
    message = complaint(write(MINIMAL.replace("  global_batch_size: 8\n", "")))
    assert message == (
        "recipe.yaml:5: 'trainer.global_batch_size' is required: "
        "Episodes per optimizer update, over all ranks."
    )
    assert "recipe.yaml: 'name' is required" in complaint(write(""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "recipe.yaml:2: duplicate key 'name', first given at recipe.yaml:1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "recipe.yaml:4: duplicate key 'b', first given at recipe.yaml:2"),
        ("name: [a\nseed: 1\n", "recipe.yaml:2: not readable YAML: "),
        ("name: a\n\tseed: 1\n", "recipe.yaml:2: not readable YAML: "),
        ("- a\n- b\n", "recipe.yaml:1: expected `key: value` lines, got a list"),
        ("just text\n", "recipe.yaml:1: expected `key: value` lines, got 'just text'"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not readable YAML: "),
        ("name: a\nsglang: &x {y: *x}\n", "recipe.yaml:2: an anchor contains itself"),
        ("base: &x {y: 1}\nz:\n  <<: *x\n", "recipe.yaml:3: merge keys"),
        ("name: !!python/name:os.system\n", "recipe.yaml:1: the YAML tag "),
        ("? [a]\n: b\n", "recipe.yaml:1: a key must be text"),
    ],
)
def test_unreadable_yaml_points_to_its_line(write: Any, text: str, message: str) -> None:
    assert complaint(write(text)).startswith(message)


def test_bytes_that_are_no_text_point_to_their_line(write: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"name: a\nmodel: \xff\n")
    assert complaint("recipe.yaml") == "recipe.yaml:2: not UTF-8 text"
    (tmp_path / "recipe.yaml").write_bytes(b"name: a\nmodel: \x07\n")
    assert complaint("recipe.yaml") == "recipe.yaml:2: character U+0007 is not allowed in YAML"


def test_a_recipe_that_does_not_exist_names_the_nearest() -> None:
    assert complaint("quikstart") == (
        "there is no recipe 'quikstart', neither a file nor a shipped one; did you mean 'quickstart'?"
    )
    assert "shipped: " in complaint("zzzz")


@pytest.mark.parametrize("override", ["trainer.num_steps", "=3", "a..b=3", ".a=3", ""])
def test_an_override_must_be_key_equals_value(write: Any, override: str) -> None:
    assert "is not of the form key=value" in complaint(write(MINIMAL), override)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("environment.options.x=a #b", "a #b"),
        ("environment.options.x=#b", "#b"),
        ("environment.options.x=a: b", {"a": "b"}),
        ("environment.options.x='a' ", "a"),
        ("environment.options.x=[1, b]", [1, "b"]),
        ("environment.options.x=1 #2", "1 #2"),
        ("environment.options.x=*", "*"),
        ("environment.options.x=*.jsonl", "*.jsonl"),
        ("environment.options.x=%r", "%r"),
        ("environment.options.x=@me", "@me"),
        ("environment.options.x=me@example.com", "me@example.com"),
        ("environment.options.x=a|b", "a|b"),
        ("environment.options.x=|b", "|b"),
        ("environment.options.x=!important", "!important"),
        ("environment.options.x=baz=qux", "baz=qux"),
        ("environment.options.x=", None),
    ],
)
def test_nothing_in_an_override_is_a_comment(write: Any, override: str, value: Any) -> None:
    assert load_minimal(write, override).environment.options == {"x": value}


@pytest.mark.parametrize(
    "text", ["[::1]", "a: b", "{x", "*x", "&x", "!x y", "% @`", "a #b", "- b", "123", "true"]
)
def test_a_text_option_takes_what_stands_behind_the_equals_sign(write: Any, text: str) -> None:
    assert load_minimal(write, f"engines.host={text}").engines.host == text
    assert load_minimal(write, f'engines.host="{text}"').engines.host == text
    assert load_minimal(write, "engines.host=null").engines.host is None


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("environment.options.x=[1] #b", "'#b' stands behind the value"),
        ("environment.options.x='a' #b", "'#b' stands behind the value"),
        (f"seed={2**70}", "more than 64 bits"),
        (f"seed={2**32}", "'seed' must be a value less than 4294967296"),
        (f"seed=-{'9' * 5000}", "more than 64 bits"),
        (f"environment.options.x=0x{'f' * 5000}", "more than 64 bits"),
        (f"environment.options.x={'[' * 5000}", "within one another"),
        (f"environment.options.x={'[' * 70 + ']' * 70}", "within one another"),
        ("rollout.sampling.temperature=1e-9", "'rollout.sampling.temperature' must be"),
    ],
)
def test_an_override_out_of_all_bounds(write: Any, override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"command line: .*{why}"):
        load_minimal(write, override)


def test_an_evaluation_may_be_greedy(write: Any) -> None:
    assert load_minimal(write, "evaluation.temperature=0").evaluation.temperature == 0.0


def test_aliases_are_counted_as_often_as_they_repeat_what_they_name(write: Any) -> None:
    lines = ["environment:", "  options:", "    a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match=r":\d+: more than 200,000 values"):
        load_config(write("extends: quickstart\n" + "\n".join(lines) + "\n"))


def test_a_file_that_is_no_recipe_is_not_read_whole(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="larger than 16 MiB, which no recipe is"):
        load_config(weights)


def test_an_unreadable_override_names_its_key(write: Any) -> None:
    message = complaint(write(MINIMAL), "sglang.x=[1")
    assert message.startswith("command line: the value of 'sglang.x' is not readable YAML: ")


def test_layers_are_merged_key_by_key_and_the_later_wins(write: Any) -> None:
    write(MINIMAL + "  device: cpu\nsglang: {schedule_policy: lpm, page_size: 1}\nseed: 1\n", "base.yaml")
    write("seed: 2\nsglang: {page_size: 2}\n", "other.yaml")
    recipe = write("extends: [base.yaml, other.yaml]\nname: top\n")
    config = load_config(recipe, ["sglang.chunked_prefill_size=3"])
    assert (config.name, config.seed, config.trainer.device) == ("top", 2, "cpu")
    assert config.sglang == {"schedule_policy": "lpm", "page_size": 2, "chunked_prefill_size": 3}


def test_an_error_in_a_lower_layer_points_to_that_file(write: Any, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(MINIMAL + "sede: 1\n", "shared/base.yaml")
    assert complaint(write("extends: shared/base.yaml\n")).startswith(
        "shared/base.yaml:8: unknown key 'sede'"
    )


def test_a_shipped_recipe_can_be_extended_by_name(write: Any) -> None:
    config = load_config(write("extends: quickstart\nseed: 7\n"))
    assert config == load_config("quickstart", ["seed=7"])


def test_extends_that_cannot_be_followed(write: Any) -> None:
    assert complaint(write("extends: nowhere.yaml\n")).startswith(
        "recipe.yaml:1: 'extends': there is no recipe"
    )
    assert complaint(write("extends: 3\n")).startswith("recipe.yaml:1: 'extends' must name a YAML file")
    write("extends: recipe.yaml\n", "loop.yaml")
    circle = complaint(write("extends: loop.yaml\n"))
    assert circle == "loop.yaml:1: 'extends' goes in a circle: recipe.yaml -> loop.yaml -> recipe.yaml"


def test_choosing_another_kind_drops_the_keys_of_the_other(write: Any) -> None:
    write(MINIMAL + "weight_sync: {bucket_bytes: 4096}\n", "base.yaml")
    recipe = write("extends: base.yaml\nweight_sync: {kind: disk}\n")
    assert load_config(recipe).weight_sync == DiskSync(kind="disk")
    again = load_config(recipe, ["weight_sync.kind=broadcast"]).weight_sync
    assert again.kind == "broadcast" and again.bucket_bytes is None
    assert again.bucket_bytes_on("cuda") == 512 * 1024 * 1024 > again.bucket_bytes_on("cpu")


def test_the_same_kind_keeps_the_lower_keys(write: Any) -> None:
    write(MINIMAL + "  algorithm:\n    kl: {kind: in_loss, coefficient: 0.5}\n", "base.yaml")
    recipe = write("extends: base.yaml\ntrainer: {algorithm: {kl: {kind: in_loss}}}\n")
    assert load_config(recipe).trainer.algorithm.kl == KLInLoss(kind="in_loss", coefficient=0.5)
    assert load_config(recipe, ["trainer.algorithm.kl.kind=none"]).trainer.algorithm.kl == NoKL()


def test_a_kind_may_be_left_out_where_there_is_a_default(write: Any) -> None:
    config = load_config(write(MINIMAL), ["trainer.algorithm.advantage.epsilon=0.5"])
    assert config.trainer.algorithm.advantage.kind == "grpo"


def test_overrides_may_name_the_kind_before_or_with_its_keys(write: Any) -> None:
    recipe = write(MINIMAL)
    expected = KLInLoss(kind="in_loss", coefficient=0.5)
    for overrides in (
        ["trainer.algorithm.kl.kind=in_loss", "trainer.algorithm.kl.coefficient=0.5"],
        ["trainer.algorithm.kl={kind: in_loss, coefficient: 0.5}"],
    ):
        assert load_config(recipe, overrides).trainer.algorithm.kl == expected


def test_every_default_is_valid() -> None:
    """Defaults are not validated when a section is made, so they are here."""
    for _, field in field_paths(RunConfig):
        if isinstance(field.default, Section):
            assert type(field.default).model_validate(field.default.model_dump()) == field.default
    config = load_config("quickstart")
    assert RunConfig.model_validate_json(config.model_dump_json(), strict=True) == config


def test_resolved_config_loads_back_to_an_equal_one(tmp_path: Path) -> None:
    config = load_config(
        "quickstart", ["trainer.algorithm.kl.kind=in_loss", "weight_sync.kind=disk", "name='1e-6'"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


_INTEGERS = st.integers(-(2**63), 2**64 - 1)
_SCALARS = st.none() | st.booleans() | _INTEGERS | st.floats(allow_nan=False) | st.text()
_TREES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1), inner), max_leaves=6
)


def _writable(value: Any) -> bool:
    """YAML cannot write surrogates, and we refuse `<<`."""
    text = json.dumps(value, ensure_ascii=False)
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text) and '"<<"' not in text


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1), _TREES, max_size=4).filter(_writable))
def test_any_free_section_round_trips(tmp_path_factory: pytest.TempPathFactory, free: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(yaml_tree.write({"sglang": free}), encoding="utf-8", newline="")
    assert yaml_tree.read_file(path).plain() == {"sglang": free}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_config(path)


def test_json_schema_accepts_the_recipe_and_describes_its_keys() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    recipe = yaml.safe_load(dump_config(load_config("quickstart")))
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**recipe, "unknown": 1}, schema)
    assert "registered id" in json.dumps(schema)


@pytest.mark.parametrize(
    "written",
    [
        "a.jsonl@[:-5]",
        '{path: "a.jsonl@[:-5]"}',
        '["a.jsonl@[:-5]"]',
        '[{path: "a.jsonl@[:-5]"}]',
    ],
)
def test_tasks_are_written_as_a_path_a_source_or_a_list(write: Any, written: str) -> None:
    recipe = write(MINIMAL.replace("TwoHopSearch-v0}", f"TwoHopSearch-v0, tasks: {written}}}"))
    if written.startswith("a"):  # a bare slice cannot stand inside braces
        recipe = write(MINIMAL)
    config = load_config(recipe, [f"environment.tasks={written}"])
    assert config.environment.tasks == [TaskSourceConfig(path="a.jsonl@[:-5]")]
    assert load_config(write(dump_config(config), "again.yaml")) == config


def test_a_wrong_task_source_is_named_where_it_was_written(write: Any) -> None:
    tasks = "environment:\n  id: polyturn/TwoHopSearch-v0\n  tasks:\n"
    inline = "environment: {id: polyturn/TwoHopSearch-v0}\n"
    listed = write(MINIMAL.replace(inline, f"{tasks}    - a.jsonl\n    - path: b.jsonl\n      weigth: 2\n"))
    assert complaint(listed) == (
        "recipe.yaml:7: unknown key 'environment.tasks.1.weigth', did you mean 'environment.tasks.1.weight'?"
    )
    one = write(MINIMAL.replace(inline, f"{tasks}    path: b.jsonl\n    weight: -1\n"))
    assert complaint(one) == (
        "recipe.yaml:6: 'environment.tasks.weight' must be a value greater than 0.0, got -1"
    )
    assert complaint(write(MINIMAL), "environment.tasks=3") == (
        "command line: 'environment.tasks' must be a list, got 3"
    )


def test_rewards_have_a_kind_and_a_rubric_has_parts(write: Any) -> None:
    recipe = write(MINIMAL)
    assert load_config(recipe).reward == EnvironmentReward()
    part = "{name: right, weight: 2, reward: {kind: rule, name: f1}}"
    config = load_config(recipe, [f"reward={{kind: rubric, parts: [{part}]}}", "group_rewards=[]"])
    assert config.reward == RubricReward(
        kind="rubric", parts=[RubricPart(name="right", weight=2, reward=RuleReward(kind="rule", name="f1"))]
    )
    assert load_config(write(dump_config(config), "again.yaml")) == config
    assert "must be one of" in complaint(recipe, "reward.kind=rubrik")
    assert "did you mean 'rubric'?" in complaint(recipe, "reward.kind=rubrik")
    assert complaint(recipe, "reward={kind: rubric, parts: []}") == (
        "command line: 'reward.parts' must be a list of at least 1, got a list"
    )
    assert complaint(recipe, "reward={kind: remote, url: x, batchsize: 3}") == (
        "command line: unknown key 'reward.batchsize', did you mean 'reward.batch_size'?"
    )


def test_engines_that_others_update_need_addresses_and_a_directory() -> None:
    with pytest.raises(ConfigError, match=r"updates: external is for servers that others started"):
        load_config("quickstart", ["engines.updates=external"])
    urls = "engines.urls=[http://10.0.0.1:30000]"
    with pytest.raises(ConfigError, match=r"set weight_sync\.kind=disk"):
        load_config("quickstart", ["engines.updates=external", urls])
    config = load_config("quickstart", ["engines.updates=external", urls, "weight_sync.kind=disk"])
    assert config.engines.num_engines == 1
