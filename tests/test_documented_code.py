"""The code of the documentation is run: Python whole, in a folder with what its page speaks of, and commands that start
no engine; those that would start one are checked by `--dry-run`.

What is not run says why: a block of Python by a comment before it, `<!-- not run: needs ... -->`, and a command
by `NOT_RUN`. Both are counted here, so that neither list grows unseen.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import polyturn
from polyturn.configs.models import resolve_model_path
from polyturn.envs import registry
from polyturn.envs.messages import EpisodeView
from tests.support.command_line import in_this_process
from tests.support.documentation import ROOT, Block, command_lines, of
from tests.support.evaluations import make_evaluation
from tests.support.stored_run import make_run

MARK = re.compile(r"<!-- not run: (needs .+?) -->\n+ *```python[^\n]*\n\Z")
NUM_NOT_RUN = 8
"""Blocks of Python that say so."""
NOT_RUN: dict[str, str] = {
    r"eval run .*--model|eval run .*openai:": "needs an engine",
    r"eval (run SUITE|resume|ctl|curate runs/evaluations/SUITE)": "needs an evaluation that was run",
    r"polyturn (serve|view(?!.*--export))": "runs until it is ended",
    r"eval validate (math|code)|polyturn (probe|rollout)": "plays for minutes",
    r"polyturn engines": "needs a run that goes on",
    r"models get": "needs the package index",
    r"--replay|resume=true|--calibrate|eval export runs/quickstart": "needs a run that was trained",
    r"convert |Qwen2.5-3B|smollm2|search_r1_3b|distillation/recipe|my_moe": "needs a model that is not shipped",
    r"my/Env|my_gym/|somebodys_package|ferry_desk|my-tasks": "needs a package that is not installed",
    r"Harbor": "needs Docker",
    r"env play \S+( --seed \d+| *$| +env_id.*)": "asks a person",
    r"polyturn.trainer.base_model.recipe": "trains for six minutes",
    r"qwen3_4b.yaml --dry-run": "needs eight GPUs",
    r"run_dir=runs/mine": "begins the run that other commands read",
    r"--step 3 --reward": "needs a step whose episodes failed",
    r"max_staleness=K": "K is a number of the reader's",
}
NUM_COMMANDS_NOT_RUN = 78
"""Commands that start something large, or need what is not here."""
STANDS_FOR = {"MODEL": "builtin:tiny-searcher", "RECIPE": "quickstart"}


def reason(block: Block) -> str | None:
    """Why a block of Python is not run; None: it is."""
    text = block.page.read_text(encoding="utf-8")
    start = "".join(text.splitlines(keepends=True)[: block.line - 1])
    found = MARK.search(start)
    return found[1] if found else None


BLOCKS = of("python")
PAGES = sorted({block.page for block in BLOCKS if reason(block) is None})


def rows(folder: Path) -> Path:
    lines = [
        json.dumps({"id": str(n), "prompt": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(200)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def a_run(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        directory = make_run(folder / "runs" / name)
        (directory / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')

    return make


def my_loss(folder: Path) -> None:
    text = (ROOT / "examples" / "algorithms" / "loss.py").read_text(encoding="utf-8")
    (folder / "my_loss.py").write_text(
        text.replace("simple_policy_optimization", "my_loss").replace("epsilon", "beta")
    )


def link_examples(folder: Path) -> None:
    (folder / "examples").symlink_to(ROOT / "examples")


FILES: dict[str, Callable[[Path], None]] = {
    "docs/tasks.md": rows,
    "docs/interop.md": lambda folder: shutil.copy(rows(folder), folder / "tasks.jsonl"),
    "docs/metrics.md": a_run("quickstart-…"),
    "docs/training.md": a_run("quickstart-…"),
    "docs/traces.md": a_run("quickstart-20260131-120000"),
    "docs/many_nodes.md": lambda folder: (folder / "key").write_text("secret\n"),
    "docs/algorithms.md": my_loss,
    "examples/algorithms/README.md": link_examples,
}
"""What a page takes for granted, in its working directory."""


def my_env() -> dict[str, Any]:
    """The environment of docs/environments.md."""
    names: dict[str, Any] = {"__name__": "documented"}
    (block,) = (block for block in BLOCKS if "class Multiply" in block.text)
    exec(compile(block.text, block.place, "exec"), names)
    return names


def registered_env() -> dict[str, Any]:
    names = my_env()
    names["register_environments"]()
    return {"MyEnv": names["Multiply"]}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/conformance.md": registered_env,
    "docs/many_nodes.md": lambda: {"options": {"api_key_file": "key"}},
    "docs/endpoint.md": lambda: {
        "episode": SimpleNamespace(
            base_url="http://127.0.0.1:1/v1", anthropic_base_url="http://127.0.0.1:1", api_key="k"
        )
    },
    "docs/search.md": lambda: {"encoder": lambda texts: texts},
    "docs/dialects.md": lambda: {
        "ToolCall": polyturn.ToolCall,
        "AssistantMessage": polyturn.AssistantMessage,
    },
}
"""What a page has from elsewhere: an episode that a run gives, an environment of another page."""

EPISODE = EpisodeView(
    task=polyturn.Task.from_prompt("t", "Where?", label="Oslo"),
    message=polyturn.AssistantMessage(content="In Oslo [atlas]"),
    messages=(),
)
USES: dict[str, str] = {
    "README.md": "assert polyturn.make('my/Arithmetic-v0').unwrapped.grade is not None",
    "docs/branching.md": "assert last_turn(None, [1, 4], 0, 0) == 4",
    "docs/dialects.md": "assert Shouts().parse('CALL search: Oslo').tool_calls[0].arguments == {'query': 'Oslo'}",
    "docs/environments.md": "assert polyturn.make('my_gym/Multiply-v0').reset(seed=0)[0]",
    "docs/math.md": "assert verify('42', '\\\\boxed{41} or \\\\boxed{42}').reason == 'hedge'\n"
    "assert verify('\\\\frac{1}{2}', 'The answer is 0.5.').correct",
    "docs/multi_agent.md": "assert Debate().reset(seed=0)[0]",
    "docs/policies.md": "assert play([], []) == 'I do not know.'",
    "docs/rewards.md": "import asyncio\nassert brief(EPISODE) == 1.0\n"
    "assert asyncio.run(Cites(['atlas'])(EPISODE)) == {'cited': 1.0}",
    "docs/scheduling.md": "group = GroupUnderWay(position=3, is_complete=True, age=0)\n"
    "assert newest([group], 1) == [3]",
    "docs/tasks.md": "assert make(0, 1) == make(0, 1)\n"
    "assert Latest(range(500), seed=0, rates=None).draw(0).task_index == 400",
    "docs/tools.md": "import asyncio\nassert asyncio.run(forecast(Place('Oslo'), days=2)) == {'highs': [20, 20]}\n"
    "book = Notebook()\nassert book.write('x') == 'page 1'",
    "docs/traces.md": "assert table.column_names == ['step', 'episode_id', 'num_turns']",
    "docs/users.md": "user = Terse(SimpleNamespace(requests=['a', 'b']))\n"
    "assert (user.opening(), user.reply('')) == ('a', 'b')",
    "docs/viewer.md": "assert show({'role': 'tool', 'content': 'a,b\\n1,2'})[0]['rows'] == [['1', '2']]",
}
"""What the code of a page is then used for, as the page says that it works."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; environments that are registered there are gone afterwards."""
    import gymnasium

    before = dict(gymnasium.registry)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_loss", None)
    for name in set(gymnasium.registry) - set(before):
        del gymnasium.registry[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_documentation_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, where a block goes on from those before it.

    Tests that a page shows are defined and not called: each runs a whole battery, as tests of those batteries do.
    """
    name = str(page.relative_to(ROOT))
    FILES.get(name, lambda folder: None)(folder)
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = module.__dict__
    names |= {each: getattr(polyturn, each) for each in polyturn.__all__}
    names |= {"polyturn": polyturn, "EPISODE": EPISODE, "SimpleNamespace": SimpleNamespace}
    names |= NAMES.get(name, dict)()
    for block in (block for block in BLOCKS if block.page == page and reason(block) is None):
        exec(compile(block.text, block.place, "exec"), names)
        names.pop("register_environments", lambda: None)()  # an installed package's entry point
    exec(compile(USES.get(name, ""), f"what {name} is used for", "exec"), names)


def test_few_blocks_of_python_are_not_run_and_each_says_why() -> None:
    marked = {block.place: reason(block) for block in BLOCKS if reason(block)}
    assert len(marked) == NUM_NOT_RUN, marked


def words_of(line: str) -> list[str]:
    """The arguments of `polyturn`, as a shell gives them to it."""
    words = shlex.split(line.replace("…", "dots").replace("...", "dots"), comments=True)
    for end in ("&", "&&", "|", ">", ">>", "2>&1", ";"):
        if end in words:
            words = words[: words.index(end)]
    return [STANDS_FOR.get(word, word) for word in words[1:]]


COMMANDS = [
    (place, line)
    for place, line in command_lines()
    if line.startswith(("polyturn ", "python -m polyturn")) and not place.startswith("configs/recipes/")
]
"""But for those of recipes, whose pages begin with data and models to fetch."""


def why_not(line: str) -> str | None:
    """Why a command is not run; None: it is."""
    written = line.partition("#")[0].strip()
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, written)), None)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs, evaluations and files that commands of the documentation name."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("quickstart-20260131-120000", "mine"):
        make_run(folder / "runs" / name)
    for name in (
        "A",
        "B",
        "before",
        "after",
        "two-hop-20260101-120000",
        "smoke-20260101-120000",
        "games-20260101-120000",
    ):
        make_evaluation(folder / "runs" / "evaluations" / name)
    link_examples(folder)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Oslo"}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(4)))
    (folder / "my.yaml").write_text("extends: [quickstart]\nname: mine\n")
    model = resolve_model_path("builtin:tiny-searcher")
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "my.jinja").write_text("{%- if enable_thinking is defined %}{%- endif %}" + template)
    (folder / "scripts").mkdir()
    script = (
        "python3 train.py --hf-checkpoint A --prompt-data train.jsonl --num-rollout 3 --rollout-batch-size 4 "
    )
    script += "--n-samples-per-prompt 4 --global-batch-size 16 --rollout-max-response-len 64\n"
    for path in ("run.sh", "scripts/run-qwen3-4B.sh"):
        (folder / path).write_text(script)
    (folder / "A").symlink_to(model)
    rows(folder)
    return folder


RUN = [(place, line) for place, line in COMMANDS if why_not(line) is None]


@pytest.mark.parametrize(("place", "line"), RUN, ids=lambda value: value[:60])
def test_a_command_of_the_documentation_runs(
    place: str, line: str, filled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled)
    registered_env()
    words = words_of(line)
    if words[0] in ("train", "sft") and "--dry-run" not in words:
        words.append("--dry-run")
    if words[:2] == ["env", "new"]:
        shutil.rmtree(filled / words[2], ignore_errors=True)
    done = in_this_process(*words)
    assert done.returncode == 0, f"{place}: {line}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"


def test_few_commands_are_not_run() -> None:
    assert len(COMMANDS) - len(RUN) == NUM_COMMANDS_NOT_RUN
