"""Launch scripts of slime become recipes: the commands of its own documentation, and the table of counterparts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from polyturn.agents.agent_play import load_agent
from polyturn.cli.main import app
from polyturn.configs.loading.loader import load_config
from polyturn.configs.loading.validation import field_paths
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.slime.counterparts import (
    COMMANDS,
    COPIED,
    DERIVED,
    LEFT_OUT,
    MODEL_OPTIONS,
    commands_table,
    table,
)
from polyturn.configs.slime.script import read_script
from polyturn.envs.rewards.factory import make_group_rewards
from polyturn.rollout.filters import make_filter
from polyturn.rollout.order import make_order
from tests.support.command_line import in_this_process

COMMAND = typer.main.get_command(app)
ROOT = Path(__file__).resolve().parents[3]
COMMON = """
CKPT_ARGS=(
   --hf-checkpoint /root/MODEL
   # --hf-checkpoint /root/MODEL-FP8
   --ref-load /root/MODEL_torch_dist
   --load /root/MODEL_slime/
   --save /root/MODEL_slime/
   --save-interval 20
)
ROLLOUT_ARGS=(
   --prompt-data /root/dapo-math-17k.jsonl --input-key prompt --label-key label
   --apply-chat-template --rollout-shuffle --rm-type deepscaler
   --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8
   --rollout-max-response-len 8192 --rollout-temperature 0.8
   --over-sampling-batch-size 64
   --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
   --partial-rollout
   --global-batch-size 256 --balance-data
)
EVAL_ARGS=(
   --eval-interval 20
   --eval-prompt-data aime /root/aime-2024.jsonl
   --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-top-p 0.7
)
GRPO_ARGS=(
   --advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.001 --kl-loss-type low_var_kl
   --entropy-coef 0.00 --eps-clip 0.2 --eps-clip-high 0.28
)
OPTIMIZER_ARGS=(
   --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
)
"""
SUBMIT = """
ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json='{
     "env_vars": {"PYTHONPATH": "/root/Megatron-LM"}
   }' \\
   -- python3 PROGRAM \\
   LAYOUT \\
   ${MODEL_ARGS[@]} \\
   ${CKPT_ARGS[@]} ${ROLLOUT_ARGS[@]} "${OPTIMIZER_ARGS[@]}" ${GRPO_ARGS[@]} \\
   ${PERF_ARGS[@]} ${EVAL_ARGS[@]} ${SGLANG_ARGS[@]}
"""


def script(
    tmp_path: Path, *, perf: str, sglang: str, layout: str, program: str = "train.py", more: str = ""
) -> Path:
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "models" / "model.sh").write_text(
        'MODEL_ARGS=(\n --num-layers 36 --hidden-size 2560 --norm-epsilon 1e-6\n --rotary-base "${BASE:-10000}"\n)\n'
    )
    path = tmp_path / "run.sh"
    path.write_text(
        '#!/bin/bash\nSCRIPT_DIR="$(cd -- x)"\nsource "${SCRIPT_DIR}/models/model.sh"\n'
        + COMMON
        + f"PERF_ARGS=(\n{perf}\n)\nSGLANG_ARGS=(\n{sglang}\n)\n{more}"
        + SUBMIT.replace("PROGRAM", program).replace("LAYOUT", layout)
    )
    return path


def imported(path: Path) -> tuple[RunConfig, dict[str, str]]:
    output = path.with_name("recipe.yaml")
    done = in_this_process("import-slime", str(path), "--output", str(output))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["to_do"] == []
    return load_config(output), said["left_out"]


GLM4_9B = {
    "perf": "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2\n"
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1\n"
    "--use-dynamic-batch-size --max-tokens-per-gpu 4608",
    "sglang": "--rollout-num-gpus-per-engine 2",
    "layout": "--actor-num-nodes 1 --actor-num-gpus-per-node 4 --rollout-num-gpus 4",
}


def test_glm4_9b_on_four_and_four_gpus(tmp_path: Path) -> None:
    config, left_out = imported(script(tmp_path, **GLM4_9B))
    assert config.model.path == "/root/MODEL"
    assert (config.engines.num_engines, config.engines.tensor_parallel, config.engines.placement) == (
        2,
        2,
        "own",
    )
    assert config.trainer.parallel.model_dump(include={"tensor", "context", "pipeline", "data"}) == {
        "tensor": 2,
        "context": 2,
        "pipeline": 1,
        "data": 1,
    }
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (32, 8)
    assert (config.trainer.global_batch_size, config.trainer.updates_per_step) == (256, 1)
    assert (config.rollout.oversample, config.rollout.filter.kind) == (2.0, "nonzero_deviation")
    assert (config.environment.max_tokens_per_turn, config.environment.max_tokens_per_episode) == (
        8192,
        12288,
    )
    assert (
        config.environment.tasks is not None
        and config.environment.tasks[0].path == "/root/dapo-math-17k.jsonl"
    )
    assert config.evaluation.tasks is not None and config.evaluation.tasks[0].path == "/root/aime-2024.jsonl"
    algorithm = config.trainer.algorithm
    assert algorithm.loss.model_dump(include={"clip_low", "clip_high"}) == {
        "clip_low": 0.2,
        "clip_high": 0.28,
    }
    assert algorithm.kl.model_dump() == {
        "kind": "in_loss",
        "estimator": "k2",
        "ratio": "none",
        "anchor": "reference",
        "coefficient": 0.001,
    }
    assert config.megatron["recompute_granularity"] == "full"
    assert left_out["--sequence-parallel"] == "always on with trainer.parallel.tensor above 1"
    assert left_out["3 options of MODEL_ARGS"]


def test_qwen3_4b_co_located_with_an_engine_for_every_two_gpus(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        perf="--tensor-model-parallel-size 2 --max-tokens-per-gpu 9216",
        sglang="--rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.7\n"
        "--sglang-cuda-graph-bs 1 2 4 8 $(seq 16 8 32) --sglang-server-concurrency 160 --sglang-tp-size 4",
        layout="--actor-num-nodes 1 --actor-num-gpus-per-node ${NUM_GPUS} --colocate",
    )
    config, left_out = imported(path)
    assert (config.engines.placement, config.engines.num_engines) == ("shared", 4)
    assert config.trainer.parallel.data == 4
    assert config.sglang == {"mem_fraction_static": 0.7}
    assert "'sglang.cuda_graph_bs'" in left_out["--sglang-cuda-graph-bs"]
    assert read_script(path).options["--sglang-cuda-graph-bs"] == ("1", "2", "4", "8", "16", "24", "32")
    assert config.rollout.max_concurrent_requests == 640
    assert "set engines.tensor_parallel" in left_out["--sglang-tp-size"]
    assert left_out["--actor-num-gpus-per-node"] == "${NUM_GPUS} is not known here; 8 is assumed"


def test_qwen3_4b_asynchronous_on_two_and_six_gpus(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        program="train_async.py",
        perf="--tensor-model-parallel-size 2",
        sglang="--rollout-num-gpus-per-engine 1",
        layout="--actor-num-nodes 1 --actor-num-gpus-per-node 2 --rollout-num-gpus 6 --update-weights-interval 2",
        more="EVAL_ARGS+=(--eval-prompt-data a /a.jsonl b /b.jsonl)\nGRPO_ARGS+=(--kl-loss-coef 0)\n",
    )
    config, _ = imported(path)
    assert (config.engines.num_engines, config.trainer.parallel.data) == (6, 1)
    assert (config.rollout.max_staleness, config.weight_sync.every_steps) == (1, 2)
    assert [suite.name for suite in config.evaluation.suites] == ["b"]
    assert config.trainer.algorithm.kl.kind == "none"


def test_glm_4_5_on_sixty_four_gpus(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        perf="--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --context-parallel-size 2\n"
        "--expert-model-parallel-size 16 --expert-tensor-parallel-size 1 --max-tokens-per-gpu 16384\n"
        "--moe-enable-deepep --moe-token-dispatcher-type flex\n"
        "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer",
        sglang="--rollout-num-gpus-per-engine 32 --sglang-mem-fraction-static 0.7\n"
        "--sglang-enable-dp-attention --sglang-dp-size 4 --sglang-ep-size 32 --sglang-enable-dp-lm-head\n"
        "--sglang-moe-dense-tp-size 1",
        layout="--actor-num-nodes 8 --actor-num-gpus-per-node 8 --colocate",
    )
    config, _ = imported(path)
    shipped = load_config("glm_4_5_355b")
    assert config.trainer.parallel == shipped.trainer.parallel
    assert config.engines.num_engines == shipped.engines.num_engines == 2
    assert config.engines.tensor_parallel == 32
    assert config.sglang == shipped.sglang
    assert config.megatron["optimizer"].items() <= shipped.megatron["optimizer"].items()


CUSTOM = """
async def reward_func(args, sample, **kwargs):
    return {"score": 1.0}

async def generate(args, sample, sampling_params):
    return sample

def keep(args, samples, **kwargs):
    return True

def oldest(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]
"""


def test_functions_of_the_scripts_own_are_called_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "own_hooks.py").write_text(CUSTOM)
    (tmp_path / "more.yaml").write_text("max_turns: 5\n")
    path = script(
        tmp_path,
        **GLM4_9B,
        more="ROLLOUT_ARGS+=(--custom-rm-path own_hooks.reward_func --reward-key score --wandb-key secret\n"
        "--dynamic-sampling-filter-path own_hooks.keep --buffer-filter-path own_hooks.oldest\n"
        "--custom-generate-function-path own_hooks.generate --custom-config-path more.yaml)\n",
    )
    config, left_out = imported(path)
    assert config.agent is not None
    options = config.agent.options
    assert options["python_path"] == [str(tmp_path)] and options["reward"] == "own_hooks.reward_func"
    assert (options["args"]["reward_key"], options["args"]["max_turns"]) == ("score", 5)
    assert "secret" not in path.with_name("recipe.yaml").read_text()
    assert load_agent(config.agent.target, options) is not None
    assert make_filter(config.rollout.filter) is not None and make_order(config.rollout) is not None
    assert not {"--custom-rm-path", "--custom-generate-function-path", "--buffer-filter-path"} & set(left_out)
    path.with_name("recipe.yaml").unlink()
    text = path.read_text().replace("--custom-generate-function-path own_hooks.generate", "--group-rm")
    path.write_text(text.replace("own_hooks.oldest", "slime.rollout.data_source.pop_first"))
    config, _ = imported(path)
    assert config.rollout.order.kind == "fifo" and len(make_group_rewards(config.group_rewards)) == 1
    path.with_name("recipe.yaml").unlink()
    path.write_text(text.replace("own_hooks.reward_func", "slime.rollout.rm_hub.f1.f1_score"))
    assert imported(path)[0].reward.model_dump(include={"kind", "name"}) == {"kind": "rule", "name": "f1"}


def test_what_is_supervised_becomes_a_recipe_of_sft(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        **GLM4_9B,
        more="ROLLOUT_ARGS+=(--rollout-function-path slime.rollout.sft_rollout.generate_rollout --num-epoch 3\n"
        "--loss-type sft_loss --prompt-data /root/rows.jsonl)\nGRPO_ARGS=()\n",
    )
    config, _ = imported(path)
    assert config.supervised is not None and config.supervised.epochs == 3
    assert [str(path) for path in config.supervised.data] == ["/root/rows.jsonl"]
    assert config.trainer.algorithm.loss.kind == "supervised"


def test_a_command_that_ends_before_its_arrays_is_read_to_its_end(tmp_path: Path) -> None:
    path = script(tmp_path, **GLM4_9B)
    path.write_text(path.read_text().replace("--rollout-num-gpus 4 \\\n", "--rollout-num-gpus 4\n"))
    config, left_out = imported(path)
    assert config.rollout.prompts_per_step == 32
    assert "for want of a backslash" in left_out["the script"]


def test_what_is_no_launch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("echo train.py\n")
    with pytest.raises(ValueError, match=r"it starts neither train\.py nor train_async\.py"):
        read_script(tmp_path / "run.sh")
    done = in_this_process("import-slime", str(tmp_path / "no.sh"))
    assert done.returncode == 2 and "no such script" in done.stderr
    path = script(tmp_path, **GLM4_9B | {"perf": "--tensor-model-parallel-size many"})
    done = in_this_process("import-slime", str(path))
    assert done.returncode == 2 and "--tensor-model-parallel-size must be a number, not 'many'" in done.stderr


def test_the_table_is_what_the_importer_does_and_names_keys_that_exist() -> None:
    page = (ROOT / "docs" / "coming_from_slime.md").read_text()
    assert table() in page and commands_table() in page
    for _, ours, _ in COMMANDS:
        if (words := ours.split())[0] == "polyturn" or "-m polyturn" in ours:
            assert words[words.index("polyturn") + 1] in COMMAND.commands
    known = {path for path, _ in field_paths(RunConfig)} | {"extends", "sglang"}
    counterparts = (*COPIED, *DERIVED, *LEFT_OUT)
    for one in counterparts:
        for key in one.keys:
            assert (
                key in known
                or any(path.startswith(f"{key}.") for path in known)
                or key.startswith(("megatron.", "sglang."))
            ), key
    options = [one.option for one in counterparts]
    assert len(options) == len(set(options)) and not MODEL_OPTIONS & set(options)
