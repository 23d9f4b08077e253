"""The synthetic world: reproducible, with disjoint splits, and nothing in it that gives an answer away."""

import itertools
import re
from collections import Counter

import pytest

from polyturn.envs.two_hop.world import WorldSize, employer_names, make_world, people_names, town_names

SIZE = WorldSize(num_people=400, num_employers=80)


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    assert make_world(5, size=SIZE) == make_world(5, size=SIZE)
    one, other = make_world(5, size=SIZE), make_world(6, size=SIZE)
    assert one.passages != other.passages
    assert one.questions != other.questions


def test_pools_share_no_person_and_no_employer():
    for names in (people_names, employer_names):
        pools = [set(names(pool)) for pool in ("demonstration", "train", "heldout")]
        assert all(pools)
        assert sum(map(len, pools)) == len(set.union(*pools))


def test_train_and_heldout_questions_share_no_person_employer_or_link():
    world = make_world(1)
    train, heldout = world.questions["train"], world.questions["heldout"]
    assert len(train) == len(heldout) == WorldSize().num_people
    for part in ("person", "employer"):
        assert not {getattr(q, part) for q in train} & {getattr(q, part) for q in heldout}
    assert {q.town for q in heldout} <= set(town_names())
    assert {q.text for q in train}.isdisjoint(q.text for q in heldout)


def test_every_entity_has_one_passage_titled_with_its_name():
    world = make_world(1)
    titles = Counter(passage.title for passage in world.passages)
    assert set(titles.values()) == {1}
    assert len(titles) > 3000
    asked = [q for questions in world.questions.values() for q in questions]
    assert {q.person for q in asked} | {q.employer for q in asked} | set(town_names()) <= set(titles)


def test_no_passage_names_both_the_person_and_the_answer_by_way_of_the_employer():
    world = make_world(1)
    text_of = {passage.title: passage.text for passage in world.passages}
    for question in (*world.questions["train"], *world.questions["heldout"]):
        assert question.employer in text_of[question.person]
        assert question.town in text_of[question.employer]
        assert question.town not in text_of[question.person]


def test_neither_the_question_nor_its_id_nor_the_order_tells_the_town():
    questions = make_world(1).questions["heldout"]
    assert not any(town in question.text for question in questions for town in town_names())
    assert [q.id for q in questions] == [f"heldout-{i}" for i in range(len(questions))]
    neighbours = sum(a.town == b.town for a, b in itertools.pairwise(questions))
    assert neighbours / len(questions) < 0.04
    assert max(Counter(q.town for q in questions).values()) / len(questions) < 0.06


def test_the_order_of_passages_tells_nothing_about_links():
    world = make_world(1)
    position = {passage.title: int(passage.id) for passage in world.passages}
    assert [int(p.id) for p in world.passages] == list(range(len(world.passages)))
    questions = world.questions["heldout"]
    distance = [abs(position[q.person] - position[q.employer]) for q in questions]
    # Two independent uniform positions are a third of the length apart on average.
    assert 0.28 < sum(distance) / len(distance) / len(world.passages) < 0.39


def test_the_answer_stands_at_no_fixed_place():
    world = make_world(1)
    text_of = {passage.title: passage.text for passage in world.passages}
    words = re.compile(r"\w+")
    place = Counter()
    rank = Counter()
    for question in world.questions["train"]:
        text = text_of[question.employer]
        place[words.findall(text).index(question.town)] += 1
        rank[[w for w in words.findall(text) if w in set(town_names())].index(question.town)] += 1
    assert max(place.values()) / place.total() < 0.4
    assert max(rank.values()) / rank.total() < 0.65


def test_a_world_larger_than_its_names_is_refused():
    with pytest.raises(ValueError, match="people of pool 'train'"):
        make_world(1, size=WorldSize(num_people=10**6))
