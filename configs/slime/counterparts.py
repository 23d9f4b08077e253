"""What each option of slime is here: a key of a recipe, or a sentence why there is none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counterpart:
    """One option of slime's."""

    option: str
    keys: tuple[str, ...] = ()
    """Keys of a recipe that it becomes."""
    how: str = ""
    """How, where the value is not simply copied; or why it is left out."""


def _copied(option: str, key: str, how: str = "") -> Counterpart:
    return Counterpart(option, (key,), how)


def _left_out(option: str, why: str) -> Counterpart:
    return Counterpart(option, (), why)


COPIED: tuple[Counterpart, ...] = (
    _copied("--hf-checkpoint", "model.path"),
    _copied("--save", "output_dir", "run directories are made below it"),
    _copied("--save-interval", "checkpoint.every_steps"),
    _copied("--num-rollout", "trainer.num_steps"),
    _copied("--rollout-batch-size", "rollout.prompts_per_step"),
    _copied("--n-samples-per-prompt", "rollout.samples_per_prompt"),
    _copied("--rollout-temperature", "rollout.sampling.temperature"),
    _copied("--rollout-top-p", "rollout.sampling.top_p"),
    _copied("--rollout-top-k", "rollout.sampling.top_k"),
    _copied("--num-steps-per-rollout", "trainer.updates_per_step"),
    _copied("--global-batch-size", "trainer.global_batch_size"),
    _copied("--eval-interval", "evaluation.every_steps"),
    _copied("--n-samples-per-eval-prompt", "evaluation.samples_per_task"),
    _copied("--eval-temperature", "evaluation.temperature"),
    _copied("--eval-top-p", "evaluation.top_p"),
    _copied("--eval-top-k", "evaluation.top_k"),
    _copied("--max-turns", "environment.max_turns"),
    _copied("--tensor-model-parallel-size", "trainer.parallel.tensor"),
    _copied("--pipeline-model-parallel-size", "trainer.parallel.pipeline"),
    _copied("--context-parallel-size", "trainer.parallel.context"),
    _copied("--expert-model-parallel-size", "trainer.parallel.expert"),
    _copied("--expert-tensor-parallel-size", "trainer.parallel.expert_tensor"),
    _copied("--max-tokens-per-gpu", "trainer.max_tokens_per_gpu"),
    _copied("--entropy-coef", "trainer.algorithm.entropy_coefficient"),
    _copied("--lr", "trainer.optimizer.learning_rate"),
    _copied("--lr-warmup-iters", "trainer.optimizer.warmup_updates"),
    _copied("--weight-decay", "trainer.optimizer.weight_decay"),
    _copied("--adam-beta1", "trainer.optimizer.beta1"),
    _copied("--adam-beta2", "trainer.optimizer.beta2"),
    _copied("--adam-eps", "trainer.optimizer.epsilon"),
    _copied("--clip-grad", "trainer.optimizer.clip_grad"),
    _copied("--recompute-granularity", "megatron.recompute_granularity"),
    _copied("--recompute-method", "megatron.recompute_method"),
    _copied("--recompute-num-layers", "megatron.recompute_num_layers"),
    _copied("--moe-enable-deepep", "megatron.moe_enable_deepep"),
    _copied("--moe-token-dispatcher-type", "megatron.moe_token_dispatcher_type"),
    _copied("--optimizer-cpu-offload", "megatron.optimizer.optimizer_cpu_offload"),
    _copied("--overlap-cpu-optimizer-d2h-h2d", "megatron.optimizer.overlap_cpu_optimizer_d2h_h2d"),
    _copied("--use-precision-aware-optimizer", "megatron.optimizer.use_precision_aware_optimizer"),
    _copied("--seed", "seed"),
)
"""Options whose value is a key's; a flag is true."""

DERIVED: tuple[Counterpart, ...] = (
    Counterpart(
        "--prompt-data", ("environment.tasks",), "a source's path; `polyturn/SingleTurn-v0` asks and grades"
    ),
    Counterpart("--input-key", ("environment.tasks",), "the source's `prompt_key`"),
    Counterpart("--label-key", ("environment.tasks",), "the source's `label_key`"),
    Counterpart("--metadata-key", ("environment.tasks",), "the source's `metadata_key`"),
    Counterpart(
        "--rm-type", ("reward",), "deepscaler, dapo and math: the rule `math`; f1: `f1`; others are left out"
    ),
    Counterpart(
        "--rollout-max-response-len",
        ("environment.max_tokens_per_turn", "environment.max_tokens_per_episode"),
        "the latter with 4,096 tokens, or --rollout-max-prompt-len, for the prompt",
    ),
    Counterpart("--rollout-max-prompt-len", ("environment.max_tokens_per_episode",), "added to the answer's"),
    Counterpart(
        "--over-sampling-batch-size", ("rollout.oversample",), "as a multiple of --rollout-batch-size"
    ),
    Counterpart(
        "--dynamic-sampling-filter-path",
        ("rollout.filter",),
        "check_reward_nonzero_std: `nonzero_deviation`; any other is called as it is",
    ),
    Counterpart(
        "--custom-rm-path",
        ("reward", "group_rewards"),
        "called as it is, the latter with --group-rm; a file with a class with `compute_reward`, too; a rule of "
        "`slime.rollout.rm_hub`: ours",
    ),
    Counterpart("--group-rm", ("group_rewards",), "with --custom-rm-path"),
    Counterpart("--reward-key", ("reward",), "in the options of the reward: which of its numbers counts"),
    Counterpart(
        "--custom-generate-function-path",
        ("agent", "environment.max_turns"),
        "called as it is; it counts its turns itself, so that `max_turns` is 64",
    ),
    Counterpart("--custom-config-path", ("agent", "reward"), "read into the options of what is called"),
    Counterpart(
        "--buffer-filter-path",
        ("rollout.order",),
        "pop_first: `fifo`; any other is called as it is, and chooses among complete groups",
    ),
    Counterpart(
        "--rollout-function-path",
        ("supervised", "rollout.max_staleness"),
        "sft_rollout: a recipe for `polyturn sft`; fully_async_rollout: 1; any other is left out",
    ),
    Counterpart("--loss-type", ("supervised",), "sft_loss: a recipe for `polyturn sft`"),
    Counterpart(
        "--num-epoch", ("supervised.epochs",), "of `polyturn sft`; else trainer.num_steps says the end"
    ),
    Counterpart(
        "--rollout-max-context-len",
        ("environment.max_tokens_per_episode",),
        "in place of answer and prompt together",
    ),
    Counterpart("--min-lr", ("trainer.optimizer.schedule",), "its `final_fraction`, over --lr"),
    Counterpart(
        "--eval-prompt-data", ("evaluation.tasks", "evaluation.suites"), "the first set, and the further ones"
    ),
    Counterpart("--actor-num-nodes", ("trainer.parallel.data",), "GPUs over tensor x pipeline x context"),
    Counterpart("--actor-num-gpus-per-node", ("trainer.parallel.data", "cluster.gpus_per_node"), "the same"),
    Counterpart("--rollout-num-gpus", ("engines.num_engines",), "over --rollout-num-gpus-per-engine"),
    Counterpart(
        "--rollout-num-gpus-per-engine", ("engines.tensor_parallel", "engines.num_engines"), "the same"
    ),
    Counterpart(
        "--colocate", ("engines.placement", "engines.num_engines", "weight_sync"), "`shared`, on all GPUs"
    ),
    Counterpart(
        "--advantage-estimator", ("extends",), "grpo, gspo, ppo, reinforce_plus_plus: the shipped algorithm"
    ),
    Counterpart("--use-kl-loss", ("trainer.algorithm.kl",), "`in_loss`, where --kl-loss-coef is above 0"),
    Counterpart("--kl-loss-coef", ("trainer.algorithm.kl",), "its `coefficient`"),
    Counterpart(
        "--kl-loss-type",
        ("trainer.algorithm.kl",),
        "always `k2`: low_var_kl in a loss has the gradient of the other KL",
    ),
    Counterpart("--kl-coef", ("trainer.algorithm.kl",), "`in_reward`, where it is above 0"),
    Counterpart(
        "--eps-clip",
        ("trainer.algorithm.loss",),
        "`clip_low`, and `clip_high` unless --eps-clip-high says it",
    ),
    Counterpart("--eps-clip-high", ("trainer.algorithm.loss",), "`clip_high`"),
    Counterpart("--eps-clip-c", ("trainer.algorithm.loss",), "`dual_clip`"),
    Counterpart("--calculate-per-token-loss", ("trainer.algorithm.reduction",), "`token_mean`"),
    Counterpart("--lr-decay-style", ("trainer.optimizer.schedule",), "its `kind`"),
    Counterpart(
        "--update-weights-interval",
        ("weight_sync.every_steps", "rollout.max_staleness"),
        "one less of the latter",
    ),
    Counterpart(
        "train_async.py", ("rollout.max_staleness",), "1: a step is played while the one before is trained on"
    ),
    Counterpart("--sglang-server-concurrency", ("rollout.max_concurrent_requests",), "times the engines"),
    Counterpart("--sglang-dp-size", ("sglang.attn_dp_size",), "with --sglang-enable-dp-attention"),
    Counterpart(
        "--sglang-*",
        ("sglang",),
        "by SGLang's own name; what the run sets itself is refused, with the key to set",
    ),
)
"""Options that decide a key together, or under another form."""

_SET = "Polyturn sets it itself"
_ALWAYS = "always so"
LEFT_OUT: tuple[Counterpart, ...] = (
    _left_out(
        "--ref-load",
        "the reference is what the run begins with; model.reference_path names another Hugging Face directory",
    ),
    _left_out(
        "--load",
        "a run goes on from its own directory (`resume`, `run_dir`); checkpoint.load begins with another's",
    ),
    _left_out("--apply-chat-template", _ALWAYS),
    _left_out("--rollout-shuffle", "always so; curriculum.sampler.kind: sequential keeps the order"),
    _left_out("--balance-data", "always so; trainer.balance says how"),
    _left_out("--use-dynamic-batch-size", "always so, by trainer.max_tokens_per_gpu"),
    _left_out(
        "--micro-batch-size",
        "samples are packed by trainer.max_tokens_per_gpu: lower that where memory is short",
    ),
    _left_out("--sequence-parallel", "always on with trainer.parallel.tensor above 1"),
    _left_out("--recompute-activations", "write megatron.recompute_granularity: selective"),
    _left_out("--sglang-enable-dp-attention", "sglang.attn_dp_size above 1 says it"),
    _left_out("--use-fault-tolerance", "always so: engines are replaced (docs/recovery.md)"),
    _left_out(
        "--partial-rollout",
        "episodes under way go on with newer weights where rollout.max_staleness is above 0",
    ),
    _left_out("--async-buffer-size", "rollout.max_staleness bounds how far is played ahead"),
    _left_out(
        "--eval-max-response-len",
        "environment.max_tokens_per_turn holds for evaluations too; a suite of evaluation.suites may have another",
    ),
    _left_out("--num-data-workers", "tasks are read ahead by threads"),
    _left_out("--streaming-data", "task files are always read as they are needed"),
    _left_out("--optimizer", "Adam, with decoupled weight decay"),
    _left_out("--attention-dropout", "0"),
    _left_out("--hidden-dropout", "0"),
    _left_out("--accumulate-allreduce-grads-in-fp32", _SET),
    _left_out("--attention-softmax-in-fp32", _SET),
    _left_out("--attention-backend", _SET),
    _left_out("--rotary-base", "read from config.json of model.path: change it there"),
    _left_out("--use-wandb", "write metrics.sinks: [{kind: wandb}] (docs/metrics.md)"),
    _left_out("--wandb-project", "write metrics.sinks: [{kind: wandb}] (docs/metrics.md)"),
    _left_out("--wandb-group", "write metrics.sinks: [{kind: wandb}] (docs/metrics.md)"),
    _left_out("--wandb-key", "log in with `wandb login`: recipes hold no secrets"),
    _left_out("--lr-warmup-fraction", "write trainer.optimizer.warmup_updates"),
    _left_out("--use-tis", "trainer.algorithm.corrections says how other samplers' tokens are weighted"),
    _left_out(
        "--custom-reward-post-process-path",
        "trainer.algorithm.reward_shaping: {kind: plugin, ...} (docs/algorithms.md)",
    ),
    _left_out(
        "--data-source-path",
        "name a generator of tasks: environment.tasks: [{generator: ...}] (docs/tasks.md)",
    ),
    _left_out("--debug-train-only", "`polyturn train --replay` trains on what an earlier run has played"),
    _left_out("--disable-compute-advantages-and-returns", "so in `polyturn sft`"),
    _left_out("--rollout-stop-token-ids", "read from generation_config.json and the chat template"),
    _left_out("--update-weight-buffer-size", "write weight_sync.bucket_bytes"),
    _left_out("--use-tensorboard", "metrics.sinks writes TensorBoard's files unless it says otherwise"),
)
"""Options without a key, and why."""

_MODEL_ARGS = """
swiglu num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention
num-query-groups use-rotary-position-embeddings disable-bias-linear add-qkv-bias normalization
norm-epsilon vocab-size kv-channels qk-layernorm post-self-attn-layernorm post-mlp-layernorm
untie-embeddings-and-output-weights rotary-percent make-vocab-size-divisible-by
max-position-embeddings position-embedding-type no-rope-fusion num-experts moe-ffn-hidden-size
moe-shared-expert-intermediate-size moe-router-topk moe-router-score-function moe-router-pre-softmax
moe-router-enable-expert-bias moe-router-bias-update-rate moe-router-load-balancing-type
moe-router-topk-scaling-factor moe-aux-loss-coeff moe-layer-freq moe-router-dtype moe-grouped-gemm
moe-permute-fusion multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim
v-head-dim use-gated-attention apply-layernorm-1p attention-output-gate moe-shared-expert-gate
moe-token-drop-policy spec rotary-interleaved rotary-scaling-factor rotary-scaling-type mscale
mscale-all-dim moe-router-group-topk moe-router-num-groups
"""
MODEL_OPTIONS = frozenset(f"--{name}" for name in _MODEL_ARGS.split())
"""Those of MODEL_ARGS: they are read from config.json of model.path."""


COMMANDS: tuple[tuple[str, str, str], ...] = (
    (
        "docker run --gpus all --ipc=host --shm-size=16g slimerl/slime:latest",
        "docker run --rm --gpus all --ipc host polyturn:gpu polyturn train RECIPE",
        "built from `configs/clusters/gpu.Dockerfile` ([containers](many_nodes.md)); no image is published",
    ),
    (
        "git clone ... && pip install -e . --no-deps",
        "make setup",
        "on a CPU; on GPUs the wheel into SGLang's own image, as that Dockerfile does",
    ),
    (
        "hf download Qwen/Qwen3-4B --local-dir /root/Qwen3-4B",
        "hf download Qwen/Qwen3-4B --local-dir /root/Qwen3-4B",
        "the same: `model.path` names the directory; nothing is downloaded by a run",
    ),
    (
        "hf download --repo-type dataset zhuzilin/dapo-math-17k",
        "hf download --repo-type dataset zhuzilin/dapo-math-17k",
        "the same: JSONL and Parquet are read as they are ([tasks](tasks.md))",
    ),
    (
        "python tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint A --save B",
        "polyturn convert A B --to torch_dist",
        "not needed for a run, which reads and writes Hugging Face's files",
    ),
    (
        "torchrun --nproc-per-node 8 --nnodes 2 tools/convert_hf_to_torch_dist.py ...",
        "torchrun --nproc-per-node 8 --nnodes 2 -m polyturn convert A B --tensor 8 --pipeline 2",
        "the same, by the ranks that are named",
    ),
    ("python tools/convert_torch_dist_to_hf.py ...", "polyturn convert B C --to hf", "a run exports itself"),
    (
        "python tools/convert_hf_to_fp8.py --strategy block --block-size 128 128",
        "polyturn convert A A-FP8 --to fp8",
        "engines of a run take FP8 from its own weights: `weight_sync.dtype: fp8_block`",
    ),
    (
        "source scripts/models/qwen3-4B.sh",
        "polyturn models list",
        "sizes are read from `config.json` of `model.path`; there is nothing to source",
    ),
    (
        "ray start --head --node-ip-address ${MASTER_ADDR} --num-gpus 8",
        "ray start --head --port=6379 --node-ip-address=10.0.0.1",
        "of several nodes alone; on one machine `polyturn train` starts what it needs",
    ),
    (
        "ray start --address=${MASTER_ADDR}:6379 --num-gpus 8",
        "ray start --address=10.0.0.1:6379",
        "the same on every other node ([several nodes](many_nodes.md))",
    ),
    (
        "for WORKER_IP in $(awk '{print $1}' mpi_hostfile); do ssh ... pkill -9 sglang; ray start ...; done",
        "polyturn train RECIPE cluster.address=10.0.0.1:6379 cluster.hosts=mpi_hostfile",
        "the host file as it is, `slots=8` too ([which nodes](cluster.md#which-nodes)); a run ends what it started",
    ),
    (
        "ray job submit --address=http://127.0.0.1:8265 -- python3 train.py ...",
        "polyturn train RECIPE cluster.address=10.0.0.1:6379",
        "the driver runs where it is called",
    ),
    ("python train_async.py ...", "polyturn train RECIPE rollout.max_staleness=1", "one loop for both"),
    ("tensorboard --logdir outputs/", "tensorboard --logdir RUN/tensorboard", "`polyturn view RUN`, too"),
)
"""Commands around a run: slime's, ours, and what is to be said."""


def commands_table() -> str:
    """The commands as a table of the documentation."""
    rows = [f"| `{theirs}` | `{ours}` | {how} |" for theirs, ours, how in COMMANDS]
    return "\n".join(["| slime | Polyturn | |", "|---|---|---|", *rows])


def table() -> str:
    """The counterparts as a table of the documentation."""
    lines = ["| slime | Polyturn | |", "|---|---|---|"]
    for one in (*COPIED, *DERIVED, *LEFT_OUT):
        lines.append(f"| `{one.option}` | {', '.join(f'`{key}`' for key in one.keys) or '-'} | {one.how} |")
    return "\n".join(lines)
