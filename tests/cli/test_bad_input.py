"""Bad input: one clear sentence, exit code 2, no traceback, and nothing started or left behind."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.support.command_line import Run, in_this_process
from tests.support.model_directory import SHAPE, write_model, write_zeros

pytestmark = pytest.mark.usefixtures("workspace")


def files_here() -> list[Path]:
    """All but what Python keeps of a plug-in that it has compiled."""
    return sorted(path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts)


def refused(run: Run, *arguments: str) -> str:
    """The one sentence that the command ends with."""
    before = files_here()
    done = run(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert files_here() == before, "something was started"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_a_recipe_that_is_right_passes(polyturn: Run, workspace: Path) -> None:
    """Otherwise every test below could pass for the wrong reason."""
    done = polyturn("train", "recipe.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not (workspace / "runs").exists()


def test_unknown_key(polyturn: Run, workspace: Path) -> None:
    with (workspace / "recipe.yaml").open("a") as file:
        file.write("environment:\n  max_turn: 3\n")
    assert refused(polyturn, "train", "recipe.yaml") == (
        "recipe.yaml:6: unknown key 'environment.max_turn', did you mean 'environment.max_turns'?"
    )


def test_unknown_key_on_the_command_line() -> None:
    assert refused(in_this_process, "train", "recipe.yaml", "trainer.num_step=3") == (
        "command line: unknown key 'trainer.num_step', did you mean 'trainer.num_steps'?"
    )


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        ("hermess", "unknown dialect 'hermess', did you mean 'hermes'?"),
        ("qwen3_codr", "unknown dialect 'qwen3_codr', did you mean 'sglang:qwen3_coder'?"),
        (
            "sglang:kimi_k22",
            "the installed SGLang has no tool-call parser 'kimi_k22', did you mean 'sglang:kimi_k2'?",
        ),
    ],
)
def test_unknown_dialect(dialect: str, words: str) -> None:
    assert refused(in_this_process, "train", "recipe.yaml", f"model.dialect={dialect}", "--dry-run") == (
        f"command line: model.dialect: {words}"
    )


def test_wrong_type() -> None:
    assert refused(in_this_process, "train", "recipe.yaml", "trainer.num_steps=many") == (
        "command line: 'trainer.num_steps' must be an integer, got 'many'"
    )


def test_missing_model_directory() -> None:
    assert refused(in_this_process, "train", "recipe.yaml", "model.path=nowhere") == (
        "model.path: there is no directory 'nowhere'; download the model there first, or name another directory"
    )
    assert refused(in_this_process, "train", "recipe.yaml", "model.path=Qwen/Qwen3-4B") == (
        "model.path: there is no directory 'Qwen/Qwen3-4B'; if it is a model of the hub, `hf download Qwen/Qwen3-4B "
        "--local-dir models/Qwen3-4B` brings it here, and model.path=models/Qwen3-4B names it"
    )
    assert refused(in_this_process, "train", "recipe.yaml", "model.path=models/smollm2-135m") == (
        "model.path: there is no directory 'models/smollm2-135m'; `polyturn models get smollm2-135m` brings it there, "
        "if `polyturn models list` has it"
    )
    message = refused(in_this_process, "train", "recipe.yaml", "model.path=builtin:tiny-sercher")
    assert message.startswith("model.path: there is no shipped model 'tiny-sercher'")


def test_the_directory_of_a_run_in_place_of_its_recipe(workspace: Path) -> None:
    (workspace / "runs" / "a").mkdir(parents=True)
    assert refused(in_this_process, "train", "runs/a") == "'runs/a' is a directory; a recipe is a YAML file"
    (workspace / "runs" / "a" / "config.yaml").write_text("name: a\n")
    assert refused(in_this_process, "train", "runs/a") == (
        "'runs/a' is the directory of a run; its recipe is runs/a/config.yaml, with resume=true it goes on"
    )


def test_tokenizer_larger_than_the_vocabulary(workspace: Path) -> None:
    write_model(workspace / "mismatch", num_tokens=261)
    assert refused(in_this_process, "train", "recipe.yaml", "model.path=mismatch") == (
        "model.path: the tokenizer in mismatch has 261 tokens, but the model's vocab_size is 260; "
        "they are not of one model"
    )


def test_a_model_directory_that_lacks_something(workspace: Path) -> None:
    for name, expected in (
        ("config.json", "model.path: broken has no config.json; is it a Hugging Face model?"),
        ("model.safetensors", "model.path: broken has no model.safetensors: it holds no weights"),
        (
            "tokenizer.json",
            "model.path: broken has no tokenizer.json; save its tokenizer there as a fast one",
        ),
    ):
        broken = write_model(workspace / "broken")
        (broken / name).unlink()
        assert refused(in_this_process, "train", "recipe.yaml", "model.path=broken") == expected
        broken.rename(workspace / f"without-{name}")


def test_a_model_that_cannot_be_used(workspace: Path) -> None:
    write_model(workspace / "short", max_position_embeddings=64)
    assert "the model in short has 64 positions" in refused(
        in_this_process, "train", "recipe.yaml", "model.path=short"
    )
    write_model(workspace / "other", model_type="gpt2")
    assert "model_type 'gpt2' is not supported" in refused(
        in_this_process, "train", "recipe.yaml", "model.path=other"
    )
    (workspace / "other" / "config.json").write_text("{\n  oops\n}")
    assert refused(in_this_process, "train", "recipe.yaml", "model.path=other").startswith(
        "other/config.json:2: not valid JSON"
    )


def test_batch_arithmetic() -> None:
    message = refused(in_this_process, "train", "recipe.yaml", "rollout.prompts_per_step=3")
    assert "3 x 8 = 24 and 128 x 1 = 128; for example set trainer.global_batch_size=24" in message


def test_more_ranks_than_cores() -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    message = refused(in_this_process, "train", "recipe.yaml", f"trainer.parallel.data={ranks}")
    assert message.startswith(f"trainer.parallel asks for {ranks} ranks")
    assert f"this machine has {ranks - 1} core(s)" in message


@pytest.mark.parametrize("key", ["engines.port", "engines.router.port"])
def test_port_taken(key: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(in_this_process, "train", "recipe.yaml", f"{key}={port}") == (
            f"{key}: port {port} on 127.0.0.1 is taken; choose another, or 0 for a free one"
        )


def test_ports_that_meet() -> None:
    overrides = ["engines.num_engines=2", "engines.port=31000", "engines.router.port=31001"]
    message = refused(in_this_process, "train", "recipe.yaml", *overrides)
    assert message.startswith("engines.router.port: port 31001 is also one of engines.port")


def test_empty_task_source(workspace: Path) -> None:
    (workspace / "tasks.jsonl").write_text("\n")
    message = refused(in_this_process, "train", "recipe.yaml", "environment.tasks=tasks.jsonl")
    assert "tasks.jsonl: the file holds no task" in message


def test_malformed_jsonl_line(workspace: Path) -> None:
    rows = [json.dumps({"prompt": "Who?", "answer": "Mara"}), '{"prompt": "Who?", "answer"', ""]
    (workspace / "tasks.jsonl").write_text("\n".join(rows))
    message = refused(in_this_process, "train", "recipe.yaml", "environment.tasks=tasks.jsonl")
    assert "tasks.jsonl:2: not valid JSON" in message


def test_a_recipe_that_does_not_exist() -> None:
    assert refused(in_this_process, "train", "quickstrat") == (
        "there is no recipe 'quickstrat', neither a file nor a shipped one; did you mean 'quickstart'?"
    )


def test_unknown_environment() -> None:
    message = refused(in_this_process, "train", "recipe.yaml", "environment.id=polyturn/TwoHopSerch-v0")
    assert message == (
        "environment.id: there is no environment 'polyturn/TwoHopSerch-v0'; "
        "did you mean 'polyturn/TwoHopSearch-v0'?"
    )


def test_upstream_sections() -> None:
    message = refused(in_this_process, "train", "recipe.yaml", "sglang.model_path=x")
    assert message == "command line: 'sglang.model_path' is not yours to set: set model.path"


def test_nothing_to_resume_from() -> None:
    assert "there is no run of 'test' in runs" in refused(
        in_this_process, "train", "recipe.yaml", "resume=true"
    )


def test_a_run_directory_that_is_taken(workspace: Path) -> None:
    (workspace / "old").mkdir()
    (workspace / "old" / "config.yaml").write_text("")
    message = refused(in_this_process, "train", "recipe.yaml", "run_dir=old")
    assert message.startswith("run_dir: old already holds a run; set resume=true")


def test_no_finished_run_to_evaluate() -> None:
    message = refused(in_this_process, "eval", "run", "recipe.yaml")
    assert message == "there is no finished run of 'test' in runs; name a model with --model PATH"


def test_an_environment_to_show_that_does_not_exist() -> None:
    message = refused(in_this_process, "env", "show", "polyturn/TwoHopSerch-v0")
    assert message.startswith("there is no environment 'polyturn/TwoHopSerch-v0'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("convert", "builtin:tiny-sercher", "out"),
            "SOURCE: there is no shipped model 'tiny-sercher', did you",
        ),
        (
            ("convert", "preset:qwen3-4b", "out"),
            "SOURCE: 'preset:qwen3-4b' is the shape of a published model",
        ),
        (("eval", "run", "recipe.yaml", "--model", "nowhere"), "--model: there is no directory 'nowhere'"),
        (
            ("train", "recipe.yaml", "trainer.algorithm.kl.kind=in_loss", "model.reference_path=nowhere"),
            "model.reference_path: there is no directory 'nowhere'",
        ),
        (
            ("train", "recipe.yaml", "engines.router.host=nowhere.invalid"),
            "engines.router.host: 'nowhere.invalid' is",
        ),
        (
            ("train", "recipe.yaml", "engines.host=192.0.2.1"),
            "engines.host: 192.0.2.1 is no address of this machine",
        ),
        (
            ("train", "recipe.yaml", f"seed={2**70}"),
            "command line: 'seed': the integer '118059",
        ),
    ],
)
def test_names_and_addresses_that_mean_nothing(arguments: tuple[str, ...], message: str) -> None:
    assert refused(in_this_process, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", '{"vocab_size": ' + "9" * 5000 + "}"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": []}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]}'),
    ],
)
def test_a_damaged_file_of_a_model_is_named(workspace: Path, name: str, text: str) -> None:
    (workspace / "model" / name).write_text(text, encoding="utf-8")
    assert refused(in_this_process, "train", "recipe.yaml").startswith(f"model/{name}")


def test_weights_that_are_not_those_of_the_config_are_named_before_anything_starts(workspace: Path) -> None:
    model, other = write_model(workspace / "rows"), write_model(workspace / "other")
    write_zeros(model / "model.safetensors", SHAPE | {"vocab_size": 19})
    told = "model.safetensors: model.embed_tokens.weight has the shape [19, 8], and config.json calls for [260, 8]"
    assert refused(in_this_process, "train", "recipe.yaml", "model.path=rows") == f"model.path: rows/{told}"
    assert (
        refused(in_this_process, "train", "recipe.yaml", "model.path=other", "checkpoint.load=rows")
        == f"checkpoint.load: rows/{told}"
    )
    whole = (other / "model.safetensors").read_bytes()
    for damaged, expected in (
        (whole[:-1], "bytes, and its header describes"),
        (b"", "is no whole safetensors file (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ):
        (other / "model.safetensors").write_bytes(damaged)
        message = refused(in_this_process, "train", "recipe.yaml", "model.path=other")
        assert message.startswith("model.path: other/model.safetensors") and expected in message


def test_layers_that_see_a_window_alone_are_refused(workspace: Path) -> None:
    config = json.loads((workspace / "model" / "config.json").read_text(encoding="utf-8"))
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (workspace / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert refused(in_this_process, "train", "recipe.yaml") == (
        "model.path: layer_types: only 'full_attention' is supported, in every layer"
    )


def test_a_pattern_that_fits_no_parameter_is_refused_before_the_start() -> None:
    message = refused(
        in_this_process, "train", "recipe.yaml", "trainer.optimizer.no_decay=['*embed_tokens*']"
    )
    assert message.startswith(
        "trainer.optimizer.no_decay: '*embed_tokens*' fits no parameter; there are, for example"
    )
    fits = "trainer.optimizer.no_decay=['*word_embeddings*', 'module.module.decoder.layers.0.*']"
    assert in_this_process("train", "recipe.yaml", "--dry-run", fits).returncode == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "curriculum.sampler={kind: plugin, target: nope:X}",
            "curriculum: cannot import 'nope': ModuleNotFoundError: No module named 'nope'; for a file, write its path "
            "with .py",
        ),
        (
            "curriculum={sampler: {kind: difficulty}, difficulties: none.jsonl}",
            "curriculum: none.jsonl cannot be read: No such file or directory",
        ),
        (
            "evaluation.suites=[{name: far, split: nothing}]",
            "evaluation.suites, far: environment: unknown split 'nothing'; the splits are train, heldout",
        ),
        (
            "evaluation.suites=[{name: far, split: train}]",
            "environment.train_split: 'train' is one that evaluation.suites play; train on another split, or say "
            "environment.train_on_heldout=true",
        ),
        (
            "trainer.stop_at={metric: heldout/mean, at_least: 1}",
            "trainer.stop_at.metric: heldout/mean is not measured between steps: set evaluation.every_steps, or "
            "every_steps of the suite",
        ),
    ],
)
def test_what_a_curriculum_or_an_evaluation_lacks_is_said_before_anything_starts(
    option: str, message: str
) -> None:
    assert refused(in_this_process, "train", "recipe.yaml", option) == message


def test_a_probe_of_tasks_without_end_or_into_another_file_is_refused(workspace: Path) -> None:
    (workspace / "sums.py").write_text(
        "def make(index, seed):\n    return {'prompt': str(index), 'answer': index}\n"
    )
    endless = (
        "environment={id: polyturn/SingleTurn-v0, tasks: {generator: 'sums.py:make'}}",
        "reward={kind: rule, name: numeric}",
    )
    assert refused(in_this_process, "probe", "recipe.yaml", *endless) == (
        "the split 'train' has more than 1,000,000 tasks, or no end: say how many to play (--tasks N)"
    )
    (workspace / "notes.jsonl").write_text('{"a": 1}\n')
    message = refused(in_this_process, "probe", "recipe.yaml", "--output", "notes.jsonl", "--tasks", "2")
    assert message.startswith("notes.jsonl:1: no line of `polyturn probe`: ")
