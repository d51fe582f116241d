"""The answer parser: explicit letters, exact names, and nothing else."""

from itertools import product

import pytest

from eval_mcq.scoring.answer_parser import parse_reply

FULL = [
    "age-related macular degeneration",
    "cataract",
    "central serous chorioretinopathy",
    "diabetic retinopathy",
]
SHORT = ["AMD", "Cataract", "CSR", "DR"]
DISEASES = [
    "AMD",
    "Cataract",
    "CSR",
    "DR",
    "Glaucoma",
    "Media Haze",
    "Myopia",
    "Retinitis",
    "DME",
    "Tessellation",
]
A, B, C, D = range(4)


def options_with(name: str, place: int) -> list[str]:
    """Four of the paper's diseases, the given one at the given place."""
    others = [other for other in DISEASES if other.lower() != name.lower()][place : place + 3]
    return [*others[:place], name, *others[place:]]


LETTER_REPLIES = (
    "{}", "{}.", "({})", " {}\n", "{})", "**{}**", "{}: {name}", "{}. {name}", "({}) {name}", "{}) {name}",
    "The answer is {}", "The answer is {}.", "The answer is ({}).", "Answer: {}", "answer: **{}**",
    "The correct option is {}: {name}", "The correct answer is {}. {name}", "I choose option {}.",
    "The answer is {} because of the drusen.", "The answer is Z.\nThe answer is {}.",
)  # fmt: skip

NAME_REPLIES = (
    "{}", "{}.", "The answer is {}", "The correct answer is {}.", "The image shows {}.", "It is {}.",
    "This fundus photograph is most consistent with {}.", "Diagnosis: {}", "the answer is a {}",
)  # fmt: skip


@pytest.mark.parametrize("template", LETTER_REPLIES)
def test_a_letter_that_answers_is_read_whatever_the_diseases_are_called(template):
    for name, place in product(DISEASES, range(4)):
        options = options_with(name, place)
        letter = "ABCD"[place]
        assert parse_reply(template.format(letter, name=name), options) == place


@pytest.mark.parametrize("template", NAME_REPLIES)
def test_a_disease_is_read_by_its_name_and_never_by_its_initial(template):
    for name, place in product([*DISEASES, *FULL], range(4)):
        options = options_with(name, place)
        for said in (name, name.lower(), name.upper()):
            assert parse_reply(template.format(said), options) == place


@pytest.mark.parametrize("template", NAME_REPLIES)
def test_a_disease_that_is_not_offered_is_nothing(template):
    """Negative control: none of A-D is chosen, whatever the initial."""
    options = ["drusen", "papilledema", "epiretinal membrane", "normal fundus"]
    for name in (*DISEASES, *FULL):
        assert parse_reply(template.format(name), options) is None


@pytest.mark.parametrize(
    "reply",
    [
        "", "   ", "...", "I cannot tell.", "None of the above", "A or B", "A, B", "A and C", "The answer is A or B",
        "The answer is A, B.", "E", "The answer is E.", "Z", "not B", "The answer is not B", "B is not the answer",
        "not glaucoma, but cataract", "It is not cataract", "no cataract", "The answer isn't cataract",
        "A cataract or diabetic retinopathy", "Drusen are visible", "severe diabetic retinopathy", "cataracts",
        "Diabetic", "Central", "Age-related", "D R", "CS", "The image shows a fundus",
        "The image shows cataract and diabetic retinopathy.", "B. diabetic retinopathy", "An image", "A fundus with C",
        "Diabetic retinopathy is unlikely; the answer is unclear", "C. difficile infection is a cataract",
    ],
)  # fmt: skip
def test_what_is_unclear_is_never_guessed(reply):
    assert parse_reply(reply, FULL) is None


@pytest.mark.parametrize(
    ("reply", "options", "expected"),
    [
        ("The answer is cataract", FULL, B),
        ("The answer is AMD", SHORT, A),
        ("DR", SHORT, D),
        ("CSR", SHORT, C),
        ("D", SHORT, D),
        ("C", SHORT, C),
        ("A", SHORT, A),
        ("b", SHORT, B),
        ("AMD", ["DR", "DME", "AMD", "CSR"], C),
        ("DME", ["DR", "DME", "AMD", "CSR"], B),
        ("B. AMD", ["DR", "AMD"], B),
        ("pathological myopia", ["myopia", "pathological myopia"], B),
        ("The image shows pathological myopia.", ["myopia", "pathological myopia"], B),
        ("The image shows myopia.", ["myopia", "pathological myopia"], A),
        ("Abnormal macula", ["Normal", "Drusen"], None),
        ("Normal", ["Normal", "Drusen"], A),
        ("The answer is A. No, the answer is B.", FULL, B),
        ("A. No: the answer is C.", FULL, C),
        ("Answer: D\nExplanation: A is wrong.", FULL, D),
        ("<answer>C</answer>", FULL, C),
    ],
)
def test_by_example(reply, options, expected):
    assert parse_reply(reply, options) == expected
