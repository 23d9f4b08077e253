"""Prompts that leave no room for an answer are found before a run, where that is cheap."""

import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from polyturn.envs.messages import ListTasks, Task
from polyturn.rollout.checks import check_prompts


@pytest.fixture
def tokenizer_path(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"w": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def tasks(*num_words):
    return ListTasks([Task.from_prompt(f"t{i}", " ".join("w" * n)) for i, n in enumerate(num_words)])


def test_a_source_without_a_playable_prompt_is_refused_in_one_sentence(tokenizer_path):
    with pytest.raises(
        ValueError, match=r"^2 of 2 prompts leave no room .*=100, such as that of task 't0' with 100 to"
    ):
        check_prompts(tasks(100, 500), tokenizer_path=tokenizer_path, max_tokens=100)


def test_a_few_are_told_and_tokens_are_counted_not_bytes(tokenizer_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_prompts(tasks(99, 100, 5), tokenizer_path=tokenizer_path, max_tokens=100)
    assert "1 of 3 prompts leave no room" in caplog.text and "'t1' with 100 tokens" in caplog.text
    caplog.clear()
    check_prompts(tasks(99), tokenizer_path=tokenizer_path, max_tokens=100)
    assert not caplog.text
