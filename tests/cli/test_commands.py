"""What the commands print when all is well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer._completion_shared import get_completion_script
from typer.testing import CliRunner

import polyturn
from polyturn import packages
from polyturn.cli.completion import complete_override
from polyturn.cli.main import app
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config, show_origins
from polyturn.configs.schema.reference import options_markdown
from polyturn.evaluations import newest_policy
from tests.support.command_line import Run, in_this_process

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["eval", "run"],
        ["eval", "report"],
        ["eval", "compare"],
        ["eval", "resume"],
        ["eval", "score"],
        ["eval", "ctl"],
        ["eval", "list"],
        ["eval", "validate"],
        ["simulate"],
        ["probe"],
        ["convert"],
        ["import-slime"],
        ["doctor"],
        ["view"],
        ["template", "check"],
        ["models", "list"],
        ["models", "get"],
        ["traces", "show"],
        ["traces", "search"],
        ["traces", "stats"],
        ["env", "list"],
        ["env", "show"],
        ["env", "play"],
        ["env", "check"],
        ["env", "new"],
        ["config", "show"],
        ["config", "schema"],
        ["config", "options"],
    ],
)
def test_help_is_short_and_has_an_example(command: list[str]) -> None:
    code, text = invoke(*command, "--help")
    assert code == 0
    assert f"Example: polyturn {' '.join(command)}" in text
    assert len(text.splitlines()) < 30


def test_a_simulation_prints_figures_and_refuses_what_it_does_not_know() -> None:
    small = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "trainer.global_batch_size=4")
    done = in_this_process(
        "simulate",
        "quickstart",
        *small,
        "--nodes",
        "1",
        "--steps",
        "3",
        "--workload",
        "mean_tool_s=2,tail=0.5",
    )
    assert done.returncode == 0, done.stderr
    assert "2 engine(s) of 1, 4 trainer rank(s)" in done.stdout and "assumed, not measured" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["staleness_max"] == 0
    for arguments, sentence in (
        (("--workload", "tial=1"), "unknown name 'tial', did you mean 'tail'?"),
        (("--rate", "engine.kv_tokens=many"), "'many' is no number"),
        (("--rate", "speed=1"), "say engine.NAME=VALUE or trainer.NAME=VALUE"),
        (("--gpu", "H1000"), "did you mean 'H100'?"),
        (("--calibrate", "no/run"), "no/run/metrics.jsonl: No such file"),
    ):
        refused = in_this_process("simulate", "quickstart", *small, *arguments)
        assert refused.returncode in (1, 2) and sentence in refused.stderr, refused.stderr


def test_dry_run_prints_config_batch_placement_memory_tasks_and_reward(
    workspace: Path,
) -> None:
    done = in_this_process("train", "recipe.yaml", "trainer.parallel.data=2", "seed=5", "--dry-run")
    assert done.returncode == 0, done.stderr
    config, batch, placed, memory, tasks, reward = re.split(
        r"^# (?:batch|placement|memory.*|tasks|reward)$", done.stdout, flags=re.MULTILINE
    )
    assert re.search(r"^train +polyturn/\S+'s own +[0-9,]+ tasks$", tasks, flags=re.MULTILINE)
    assert re.search(r"^heldout +", tasks, flags=re.MULTILINE)
    assert "the environment's own grade" in reward
    (workspace / "again.yaml").write_text(config)
    assert load_config("again.yaml") == load_config("recipe.yaml", ["trainer.parallel.data=2", "seed=5"])
    assert batch.strip() == "16 prompts x 8 samples = 128 episodes a step = 128 global batch x 1 update(s)"
    assert [line.split("  ")[:3] for line in placed.strip().splitlines()] == [
        ["127.0.0.1", "cpu", "trainer ranks 0-1"],
        ["127.0.0.1", "cpu", "engine 0"],
    ]
    assert "trainer rank (x 2)" in memory and "kv cache" in memory
    assert not (workspace / "runs").exists()


def test_dry_run_lists_the_tasks_of_every_evaluation(workspace: Path) -> None:
    environment = "{id: polyturn/MathCalculator-v0, max_tokens_per_episode: 512}"
    suites = f"evaluation.suites=[{{name: sums, environment: {environment}}}]"
    done = in_this_process("train", "recipe.yaml", suites, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^sums: heldout +polyturn/MathCalculator-v0's own +[0-9,]+ tasks$", done.stdout, flags=re.MULTILINE
    )


def test_config_show_and_schema_agree() -> None:
    _, shown = invoke("config", "show", "quickstart", "seed=3")
    _, schema = invoke("config", "schema")
    resolved = yaml.safe_load(shown)
    assert resolved["seed"] == 3
    jsonschema.validate(resolved, json.loads(schema))


def test_config_show_says_where_each_value_was_written(workspace: Path) -> None:
    (workspace / "mine.yaml").write_text(
        "extends: recipe.yaml\nseed: 9\nmodel:\n  path: builtin:tiny-searcher\nenvironment:\n"
        "  options: {note: 'a # b'}\n"
    )
    overrides = ("trainer.num_steps=5", "group_rewards=[{name: n, target: 'm:f', weight: 2}]")
    text = show_origins("mine.yaml", overrides, options=["output_dir=elsewhere"])
    lines = {
        line.split(":")[0].strip(): line.rpartition("  # ")[2] for line in text.splitlines() if "  # " in line
    }
    assert lines["seed"] == "mine.yaml:2" and lines["note"] == "mine.yaml:6"
    assert lines["output_dir"] == "Python"
    for written in (
        r"path: builtin:tiny-searcher +# mine\.yaml:4",
        r"num_steps: 5 +# command line",
        r"target: m:f +# command line",
        r"weight: 2\.0 +# command line",
    ):
        assert re.search(f"{written}$", text, flags=re.MULTILINE), (written, text)
    assert re.search(r"samples_per_prompt: \d+ +# \S*quickstart\.yaml:\d+$", text, flags=re.MULTILINE), text
    assert re.search(r"learning_rate: \S+ +# default$", text, flags=re.MULTILINE)
    # It is still the recipe.
    resolved = load_config("mine.yaml", overrides, options=["output_dir=elsewhere"])
    (workspace / "again.yaml").write_text(text)
    assert load_config("again.yaml") == resolved
    shown = in_this_process("config", "show", "mine.yaml", "--origin", *overrides)
    assert shown.stdout == show_origins("mine.yaml", overrides)


def test_options_of_a_program_are_told_as_python() -> None:
    with pytest.raises(ConfigError, match=r"^Python: 'seed' must be an integer"):
        polyturn.load_config("quickstart", seed="x")


def test_the_documented_options_are_those_of_the_schema() -> None:
    """Regenerate the second half of docs/configuration.md with `polyturn config options`."""
    documented = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert documented.endswith(options_markdown())


def test_links_of_the_option_tables_have_targets() -> None:
    text = options_markdown()
    headings = {
        "".join(c for c in line[3:].lower().replace(" ", "-") if c.isalnum() or c in "-_")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links and set(links) <= headings


def test_a_missing_package_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = packages.Package(
        distribution="no-such-package",
        module="no_such",
        used_for="nothing",
        install="pip install no-such-package",
    )
    monkeypatch.setattr(packages, "PACKAGES", (absent,))
    with pytest.raises(
        ConfigError, match=r"^not installed: no-such-package; install with: pip install no-such-package$"
    ):
        packages.require()


def test_the_newest_finished_run_is_evaluated(workspace: Path) -> None:
    config = load_config("recipe.yaml")
    for name, finished in (
        ("test-20260101-000000", True),
        ("test-20260102-000000", True),
        ("test-20260103-000000", False),
        ("test-other-20260104-000000", True),
    ):
        policy = workspace / "runs" / name / "policy"
        policy.mkdir(parents=True)
        if finished:
            (policy / "config.json").write_text("{}")
    assert newest_policy(config) == Path("runs/test-20260102-000000/policy")
    named = config.model_copy(update={"run_dir": Path("runs/test-20260101-000000")})
    assert newest_policy(named) == Path("runs/test-20260101-000000/policy")
    with pytest.raises(ConfigError, match="no finished run"):
        newest_policy(config.model_copy(update={"name": "nothing"}))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train quick", "quickstart"),
        ("train quickstart trainer.num_st", "trainer.num_steps="),
        ("train quickstart rollout.sampling.see", "rollout.sampling.seeded="),
        ("env play polyturn/Two", "polyturn/TwoHopSearch-v0"),
        ("eval run smoke --policy ora", "oracle"),
        ("eval run smo", "smoke"),
        ("traces stats runs/te", "runs/test-20260101-000000"),
    ],
)
def test_the_shell_completes_what_users_name(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, words: str, expected: str
) -> None:
    (workspace / "runs" / "test-20260101-000000" / "trajectories").mkdir(parents=True)
    monkeypatch.setenv("_POLYTURN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"polyturn {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    result = CliRunner().invoke(app, [], prog_name="polyturn")
    assert expected in result.output.splitlines(), result.output


@pytest.mark.parametrize(
    ("shell", "asked", "answered"),
    [
        ("zsh", {}, '_arguments \'*: :(("oracle"\n"openai\\\\:"))\''),
        ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}, "oracle\nopenai:"),
    ],
)
def test_zsh_and_fish_are_answered_as_their_scripts_ask(
    monkeypatch: pytest.MonkeyPatch, shell: str, asked: dict[str, str], answered: str
) -> None:
    """What `--show-completion` prints asks by these variables; tried by hand in zsh 5.9 and fish 3.6."""
    script = get_completion_script(prog_name="polyturn", complete_var="_POLYTURN_COMPLETE", shell=shell)
    words = {
        "_POLYTURN_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "polyturn eval run smoke --policy o",
    }
    assert all(name in script for name in (*words, *asked)) and f"=complete_{shell}" in script
    for name, value in {**words, **asked}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, [], prog_name="polyturn")
    assert result.output.strip() == answered


def test_choices_of_an_option_are_completed_behind_it() -> None:
    assert complete_override("rollout.sampling.seeded=t") == ["rollout.sampling.seeded=true"]
    assert "trainer.device=cuda" in complete_override("trainer.device=")
    assert complete_override("no.such=") == []


def test_version(polyturn: Run) -> None:
    assert polyturn("--version").stdout.startswith("polyturn ")
