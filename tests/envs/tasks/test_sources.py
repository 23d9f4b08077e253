"""Parquet files, slices, generators and mixtures as sources of tasks."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tasks import (
    GeneratedTasks,
    JsonlTasks,
    MixtureTasks,
    ParquetTasks,
    RowKeys,
    RowReader,
    SlicedTasks,
)
from polyturn.envs.tasks.order import PrefetchedTasks
from polyturn.envs.tasks.sources import open_tasks, split_slice

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def write_jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows, **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def some_tasks(count: int, name: str = "t") -> ListTasks:
    return ListTasks([Task.from_prompt(f"{name}-{i}", f"question {i}", label=str(i)) for i in range(count)])


def labels(source) -> list:
    return [source[index].label for index in range(len(source))]


class TestParquet:
    def test_rows_are_those_of_the_same_jsonl_file(self, tmp_path):
        rows = [
            {"id": f"q{i}", "prompt": CHAT if i % 2 else f"p{i}", "answer": str(i), "metadata": {"level": i}}
            for i in range(10)
        ]
        texts = [{**row, "prompt": CHAT} for row in rows]
        jsonl = JsonlTasks(write_jsonl(tmp_path / "rows.jsonl", *texts))
        parquet = ParquetTasks(write_parquet(tmp_path / "rows.parquet", texts, row_group_size=3))
        assert [parquet[index] for index in range(10)] == [jsonl[index] for index in range(10)]
        assert parquet.find("q7") == jsonl[7]

    def test_any_row_can_be_read_with_a_cache_of_one_row_group(self, tmp_path):
        rows = [{"prompt": "p", "answer": str(i)} for i in range(50)]
        path = write_parquet(tmp_path / "rows.parquet", rows, row_group_size=7)
        tasks = ParquetTasks(path, cache_bytes=1)
        order = [(index * 17) % 50 for index in range(50)]
        assert [tasks[index].label for index in order] == [str(index) for index in order]
        assert tasks[3].task_id == "rows-4"

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ([{"promt": "p", "answer": "a"}], r"rows\.parquet: unknown key 'promt', did you mean 'prompt'"),
            ([{"prompt": "p", "answer": "a"}, {"prompt": None, "answer": "a"}], r":2: missing key 'prompt'"),
            ([{"prompt": "p", "answer": "a"}, {"prompt": "p", "answer": None}], r":2: a task has one of"),
            ([{"prompt": 3, "answer": "a"}], r":1: 'prompt' must be a text or a list"),
            ([{"id": "x", "prompt": "p", "answer": "a"}] * 2, r":2: line 1 already has the id 'x'"),
        ],
    )
    def test_a_malformed_row_is_named_by_file_and_row(self, tmp_path, rows, words):
        with pytest.raises(ValueError, match=words):
            ParquetTasks(write_parquet(tmp_path / "rows.parquet", rows))

    def test_what_is_no_parquet_file_or_has_no_rows_is_refused(self, tmp_path):
        (tmp_path / "bad.parquet").write_text("{}")
        with pytest.raises(ValueError, match=r"bad\.parquet: not a Parquet file"):
            ParquetTasks(tmp_path / "bad.parquet")
        schema = pa.schema([("prompt", pa.string()), ("answer", pa.string())])
        pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
        with pytest.raises(ValueError, match=r"empty\.parquet: the file holds no task"):
            ParquetTasks(tmp_path / "empty.parquet")

    def test_threads_may_read_at_once(self, tmp_path):
        rows = [{"prompt": "p", "answer": str(i)} for i in range(200)]
        path = write_parquet(tmp_path / "rows.parquet", rows, row_group_size=10)
        tasks, wrong = ParquetTasks(path, cache_bytes=1), []

        def read(step):
            wrong.extend(i for i in range(0, 200, step) if tasks[i].label != str(i))

        threads = [threading.Thread(target=read, args=(step,)) for step in (1, 3, 7, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


class TestSlices:
    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("a.jsonl", None),
            ("a.jsonl@[0:10]", slice(0, 10)),
            ("a.jsonl@[:-5]", slice(None, -5)),
            ("a@b/c.jsonl@[ -7 : ]", slice(-7, None)),
            ("a.jsonl@[:]", slice(None, None)),
            ("a.jsonl@[1_000:2_000]", slice(1000, 2000)),
        ],
    )
    def test_slices_are_read_as_in_python(self, text, part):
        assert split_slice(text) == (text.rpartition("@[")[0] or text, part)

    @pytest.mark.parametrize("text", ["a@[1]", "a@[1:2:3]", "a@[a:b]", "a@[1.5:2]", "a@[]", "a@[1:2", "a@"])
    def test_what_is_no_slice_is_refused(self, text):
        with pytest.raises(ValueError, match=r"slice"):
            split_slice(text)

    @pytest.mark.parametrize("part", [slice(2, 5), slice(-3, None), slice(None, -8), slice(0, 99)])
    def test_a_slice_holds_what_the_list_would(self, part):
        source = some_tasks(10)
        sliced = SlicedTasks(source, part)
        assert labels(sliced) == labels(source)[part]
        assert sliced.find(sliced[0].task_id) == sliced[0]
        with pytest.raises(IndexError):
            sliced[len(sliced)]

    def test_an_empty_slice_is_refused(self):
        with pytest.raises(ValueError, match=r"x\.jsonl: the slice \[10:\] holds none of its 10 tasks"):
            SlicedTasks(some_tasks(10), slice(10, None), name="x.jsonl")
        with pytest.raises(ValueError, match="no task 't-1'"):
            SlicedTasks(some_tasks(10), slice(5, None)).find("t-1")


def add_one(index, seed):
    return {"prompt": f"{index} + {seed}?", "answer": index + seed}


class TestGenerated:
    def test_tasks_follow_from_index_and_seed(self):
        tasks = GeneratedTasks(add_one, size=5, seed=7)
        assert labels(tasks) == [7, 8, 9, 10, 11]
        assert tasks.find("add_one-7-3") == tasks[3]
        with pytest.raises(IndexError):
            tasks[5]

    def test_there_may_be_no_end(self):
        tasks = GeneratedTasks(add_one)
        assert tasks.is_endless
        assert tasks[10**18].label == 10**18

    def test_what_is_no_generator_is_refused(self):
        with pytest.raises(ValueError, match=r"def generate\(index: int, seed: int\)"):
            GeneratedTasks(lambda index: {"prompt": "p", "answer": "a"}, size=3)
        with pytest.raises(ValueError, match="must return a Task or a mapping, not str"):
            GeneratedTasks(lambda index, seed: "task")
        with pytest.raises(ValueError, match="task 0: missing key 'prompt'"):
            GeneratedTasks(lambda index, seed: {"answer": 3}, name="mine")
        count = iter(range(10))
        with pytest.raises(ValueError, match="was another one when made again"):
            GeneratedTasks(lambda index, seed: {"prompt": f"{next(count)}", "answer": 3})
        with pytest.raises(ValueError, match="size must be at least 1"):
            GeneratedTasks(add_one, size=0)


class TestMixture:
    def test_positions_run_through_the_sources(self):
        mixture = MixtureTasks([some_tasks(3, "a"), some_tasks(2, "b")], weights=[1, 9])
        assert [mixture[i].task_id for i in range(5)] == ["a-0", "a-1", "a-2", "b-0", "b-1"]
        assert mixture.find("b-1") == mixture[4]
        with pytest.raises(IndexError):
            mixture[5]
        with pytest.raises(ValueError, match="no task 'c-1'"):
            mixture.find("c-1")

    @pytest.mark.parametrize(
        ("weights", "words"),
        [
            ([1], "1 weights for 2 sources"),
            ([1, 0], "positive"),
            ([1, -1], "positive"),
            ([1, float("nan")], "pos"),
        ],
    )
    def test_wrong_weights_are_refused(self, weights, words):
        with pytest.raises(ValueError, match=words):
            MixtureTasks([some_tasks(1, "a"), some_tasks(1, "b")], weights=weights)

    def test_nothing_to_mix_is_refused(self):
        with pytest.raises(ValueError, match="at least one source"):
            MixtureTasks([])


class TestPrefetch:
    def test_announced_tasks_are_read_by_other_threads_and_once(self):
        read = []

        class Watched:
            def __len__(self):
                return 100

            def __getitem__(self, index):
                read.append((index, threading.current_thread().name))
                return Task.from_prompt(str(index), "p")

        tasks = PrefetchedTasks(Watched(), num_workers=2, max_kept=10)
        tasks.prefetch(range(8))
        assert [tasks[index].task_id for index in (3, 3, 7)] == ["3", "3", "7"]
        assert tasks[50].task_id == "50"
        tasks.close()
        assert sorted(index for index, _ in read) == [*range(8), 50]
        assert all(name.startswith("tasks") for _, name in read)

    def test_an_error_reaches_whoever_asks(self):
        tasks = PrefetchedTasks(some_tasks(3))
        tasks.prefetch([5])
        with pytest.raises(IndexError):
            tasks[5]
        tasks.close()


class TestConfig:
    def test_paths_slices_generators_and_weights_become_sources(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_jsonl(tmp_path / "a.jsonl", *({"prompt": "p", "answer": str(i)} for i in range(10)))
        write_parquet(tmp_path / "b.parquet", [{"q": "p", "gold": str(i), "x": i} for i in range(4)])
        (tmp_path / "make.py").write_text(
            "def make(index, seed):\n    return {'prompt': 'p', 'answer': index}\n"
        )
        mixture = open_tasks(
            [
                TaskSourceConfig(path="a.jsonl@[2:5]", weight=2),
                TaskSourceConfig(
                    path="b.parquet", prompt_key="q", label_key="gold", other_keys="keep", weight=1
                ),
                TaskSourceConfig(generator="make.py:make", weight=0.5),
            ]
        )
        assert isinstance(mixture, MixtureTasks)
        assert [len(source) for source in mixture.sources][:2] == [3, 4]
        assert [mixture[i].label for i in range(9)] == ["2", "3", "4", "0", "1", "2", "3", 0, 1]
        assert mixture[4].metadata == {"x": 1}
        assert mixture.weights == (2, 1, 0.5)

    def test_an_unchanged_file_is_opened_once_and_a_changed_one_again(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "p", "answer": "1"})
        source = TaskSourceConfig(path=str(path))
        assert open_tasks([source]) is open_tasks([source])
        write_jsonl(path, {"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": "2"})
        assert len(open_tasks([source])) == 2

    @pytest.mark.parametrize(
        ("sources", "words"),
        [
            ([], "list of task sources is empty"),
            ([{}], "either a 'path' or a 'generator'"),
            ([{"path": "a.jsonl", "generator": "m:f"}], "either a 'path' or a 'generator'"),
            ([{"path": "none.jsonl@[:5]"}], r"none\.jsonl: no such task file"),
            ([{"path": "a.jsonl", "size": 3}], r"a\.jsonl: size and seed are options of a generator"),
            (
                [{"path": "a.jsonl", "weight": 1}, {"path": "a.jsonl@[:1]"}],
                r"a\.jsonl@\[:1\]: it has no weight",
            ),
            ([{"path": "a.jsonl"}, {"generator": "make.py:make"}], "needs a weight beside other sources"),
            ([{"generator": "make.py:mkae"}], r"make\.py has no 'mkae', did you mean 'make'"),
            ([{"generator": "none.py:make"}], r"none\.py: no such file"),
            ([{"generator": "make"}], "not of the form module:name"),
            ([{"generator": "no_such_module:make"}], "cannot import 'no_such_module'"),
            (
                [{"path": "a.jsonl", "environment": {"id": "none/None-v0"}}],
                "there is no environment 'none/None-v0'",
            ),
        ],
    )
    def test_a_wrong_source_is_refused(self, tmp_path, monkeypatch, sources, words):
        monkeypatch.chdir(tmp_path)
        write_jsonl(tmp_path / "a.jsonl", *({"prompt": "p", "answer": str(i)} for i in range(3)))
        (tmp_path / "make.py").write_text(
            "def make(index, seed):\n    return {'prompt': 'p', 'answer': index}\n"
        )
        with pytest.raises(ValueError, match=words):
            open_tasks([TaskSourceConfig(**source) for source in sources])


def test_a_reader_may_drop_columns(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [{"prompt": "p", "answer": "a", "extra": 1}])
    assert ParquetTasks(path, reader=RowReader(RowKeys(others="drop")))[0].metadata == {}
