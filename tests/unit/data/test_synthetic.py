import collections
import math

from titan_fp8.data.synthetic import story


def test_a_story_is_a_function_of_its_key():
    assert story(0, 1, 2) == story(0, 1, 2)
    assert len({story(0, seed, number) for seed in range(5) for number in range(200)}) > 990


def test_the_stories_never_change_between_versions():
    assert story(0, 0).startswith(
        "On Tuesday Ada and Clara meet in the harbour. Ada counts the boats: seven, eight, nine."
    )


def test_training_and_validation_stories_are_different_ones():
    train = {story(0, 0, number) for number in range(500)}
    validation = {story(1, 0, number) for number in range(500)}
    assert len(train & validation) < 5


def test_the_language_can_be_learned_from_a_few_characters_of_context():
    """What a model of 6 characters of context reaches in nats a character: far below the 3.4 of 30 equal letters."""
    text = "".join(story(0, number) for number in range(3000))
    held_out = "".join(story(1, number) for number in range(50))
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for place in range(6, len(text)):
        counts[text[place - 6 : place]][text[place]] += 1
    loss = 0.0
    for place in range(6, len(held_out)):
        seen = counts[held_out[place - 6 : place]]
        loss -= math.log((seen[held_out[place]] + 0.01) / (seen.total() + 0.3))
    assert 0.1 < loss / (len(held_out) - 6) < 0.6
