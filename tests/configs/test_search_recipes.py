"""The Search-R1 recipes hold together, and keep to what was published."""

from polyturn.configs.loading.loader import load_config
from polyturn.envs.registry import make


def test_the_recipes_of_search_r1():
    small, full = load_config("search_r1", ()), load_config("search_r1_3b", ())
    for config in (small, full):
        env = make(config.environment.id, **config.environment.options)
        style = env.unwrapped.style
        assert (style.name, style.top_k, style.reward) == ("search_r1", 3, "exact_match")
        assert config.model.dialect == style.name
        assert config.environment.max_turns == style.max_searches + style.final_answer_turn
        samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        assert samples == config.trainer.global_batch_size * config.trainer.updates_per_step
        assert config.trainer.algorithm.kl.coefficient == 1e-3
    assert full.trainer.optimizer.learning_rate == 1e-6
    assert (full.rollout.prompts_per_step, full.rollout.samples_per_prompt) == (512, 5)
    assert full.environment.max_tokens_per_turn == 500
