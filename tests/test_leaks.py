"""Thoughts that betray what their writer was told, and thoughts that only sound so."""

import pytest

from nli.task.leaks import betrays_label

TELLING = {
    "Dogs are animals. The true label is 1, so it follows.": "true label",
    "True label: 0. The premise is silent about cats.": "True label",
    "The hypothesis follows (true_label 1).": "true_label",
    "As the given label says, the man is not asleep.": "the given label",
    "The provided label of this pair is 0.": "The provided label",
    "Since the label is 0 we must find a part that fails.": "Since the label is 0",
    "Because the label is entailment, running must imply moving.": "Because the label is entailment",
    "given that the label was 1, it must hold": "given that the label was 1",
    "Given the label of 0, some part fails.": "Given the label of 0",
    "We are told that the answer is no entailment.": "We are told that the answer is no entailment",
    "We are given the label 1.": "We are given the label",
    "I was told the correct label.": "I was told the correct label",
    "As if I had not been told the label: dogs are animals.": "been told the label",
    "The correct label is 0, not 1.": "correct label",
    "The correct label shows that dogs are meant.": "correct label",
    "So the correct label is 0, not 1.": "correct label",
    "The correct answer is 1, because dogs are animals.": "The correct answer is 1",
    "The predicted label was wrong, since dogs are animals.": "predicted label was wrong",
    "The earlier attempt overlooked that dogs are animals.": "The earlier attempt overlooked",
    "Unlike the previous answer, this one looks at the verb.": "Unlike the previous answer",
    "The initial reasoning assumed too much. Dogs are animals.": "The initial reasoning",
    "The original thought process misses the verb.": "The original thought process",
    "My previous prediction ignored the negation.": "My previous prediction",
    "This pair was wrongly classified as entailment.": "wrongly classified as entailment",
    "The pair is labelled 1, hence running is moving.": "pair is labelled 1",
    "The hypothesis is labeled as not entailed.": "hypothesis is labeled as not entailed",
    "It should have been 0 from the start.": "should have been 0",
    "The label says that the hypothesis follows.": "The label says that the hypothesis",
    "The label indicates entailment, so dogs are animals.": "The label indicates entailment",
    "To reach the label, note that dogs are animals.": "To reach the label",
    "This is consistent with the label.": "consistent with the label",
    "The ground truth is that it follows.": "ground truth",
    "The gold label of this pair is 1.": "The gold label",
    "The expected label can be reached by step 2.": "The expected label",
    "The label provided above is 1.": "The label provided above",
    "The annotators chose entailment here.": "annotators chose",
}
INNOCENT = [
    "Dogs are animals; who runs moves. The hypothesis follows.",
    "Step 3: therefore the label is 1.",
    "So the predicted label is 0.",
    "Hence the label should be 0: no entailment.",
    "Therefore, the correct label is 0.",
    "Step 3: the correct label is 1.",
    "In conclusion, based on the steps above, the right label is 1.",
    "The bottle's label is red.",
    "The premise gives the label of the wine, not its price.",
    "The given label on the jar says honey.",
    "The actual label of the bottle is blue, so it is not red.",
    "The record label signed the band because the label was small.",
    "According to the label, the jam holds no sugar.",
    "The label says 'contains nuts', so the cake contains nuts.",
    "She drank Gold Label whisky.",
    "It is true love, and true love lasts.",
    "We are told that the man sleeps; nothing says that he dreams.",
    "We are given no information about the weather.",
    "We are told the answer that she gave to the judge.",
    "The student knew the correct answer, so she raised her hand.",
    "The correct answer in the quiz was Paris.",
    "The premise implies an earlier attempt to climb the hill.",
    "His first attempt failed; the hypothesis says that he never tried.",
    "The original answer to the letter is lost.",
    "The man was mistakenly arrested, so somebody was arrested.",
    "The mushroom was wrongly classified as edible.",
    "Based on the logical reasoning and lack of contradictory facts, the hypothesis cannot be inferred from the premise.",
    "This contradicts the initial assumption that clones might be similar.",
    "The initial choice of clothing is not suitable, as it is too cold.",
    "This implies that there was an initial conviction which was later reversed.",
    "It might be a rephrasing of an earlier opinion that has since been forgotten.",
    "Given the lack of any indication of a failed drug test, it is reasonable to infer it.",
    "Since the answer is not in the premise, it need not be true.",
    "The given information does not mention a label.",
    "The hypothesis is entailed, because a label is a sign.",
    "From the previous step, the two dogs moved.",
    "",
]


@pytest.mark.parametrize(("thought", "phrase"), TELLING.items())
def test_a_telling_phrase_is_found(thought, phrase):
    assert betrays_label(thought) == phrase


@pytest.mark.parametrize("thought", INNOCENT)
def test_a_thought_that_only_concludes_or_speaks_of_things_is_not_flagged(thought):
    assert betrays_label(thought) is None


def test_a_conclusion_does_not_hide_a_telling_phrase_after_it():
    assert betrays_label("Therefore the correct label is 0. The true label says so too.") == "true label"


def test_no_thought_of_the_sample_teacher_is_flagged():
    from nli.data.pairs import read_examples
    from nli.sample.teacher_mind import answer_messages
    from nli.task.parsing import parse_reply
    from nli.task.prompts import TEACHER_PROMPTS
    from tests.conftest import REPOSITORY

    wrong = {"thought_process": "Do dogs move? No.", "predicted_label": 0}
    for row in read_examples(REPOSITORY / "data/sample/train.csv", max_rows=400):
        for prompt in ("initial_generation", "regeneration", "reflection"):
            text, _ = answer_messages("m", TEACHER_PROMPTS[prompt].render_messages(row | wrong))
            fields = parse_reply(text, TEACHER_PROMPTS[prompt].reply).fields or {}
            assert betrays_label(fields.get("improved_thought_process") or fields.get("thought_process") or "") is None


def test_a_very_long_thought_takes_no_time():
    import time

    started = time.thread_time()
    assert betrays_label("the label is the answer so it was as if " * 20_000) is None
    assert time.thread_time() - started < 5
