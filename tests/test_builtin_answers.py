"""Final answers of maths problems: found in texts as GSM8K and MATH write them, and compared as numbers."""

from __future__ import annotations

import time

import pytest

from stages.builtin.answers import final_answer, maths_score, reference_answer, values_of


def score(response: str, answer: str) -> float:
    return maths_score(response, (reference_answer(answer),))


EQUAL = [
    ("The answer is 72.", "72"),
    ("First 12, then <<48+24=72>>72 clips\n#### 72", "72"),
    ("#### 1,080", "1080"),
    ("It costs $1,234.50.", "1234.5"),
    (r"so \boxed{\frac{3}{4}}", "0.75"),
    (r"\boxed{\frac34}", "3/4"),
    (r"$\boxed{-\dfrac{1}{2}}$", "-0.5"),
    (r"\boxed{1\frac{1}{2}}", "3/2"),
    ("1½ litres", "1.5"),
    ("50%", "50"),
    ("50%", "0.5"),
    (r"\boxed{12\%}", "12%"),
    ("It is 12 percent", "12%"),
    (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{10\,000}", "10,000"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{\$18.00}", "18"),
    ("They need 5 km/h", "5"),
    ("109.2 million people", "109,200,000"),
    (r"\boxed{1.5 \times 10^{3}}", "1500"),
    ("1e3", "1000"),
    ("10-5", "5"),  # a difference, whose last number is 5
    ("so x = -5", "-5"),
    ("−5", "-5"),
    ("-$5", "-5"),
    ("1/3", "0.33333333"),
    ("答案是72元。", "72"),
    ("答案：３．５", "3.5"),
    ("占4分之3", "3/4"),
    ("百分之12", "12%"),
    ("一共3万人", "30000"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{5\pi}", r"5\pi"),
    (r"\boxed{\sqrt2}", r"\sqrt{2}"),
    (r"\boxed{\text{Evelyn}}", "Evelyn"),
    (r"\boxed{\boxed{7}}", "7"),
    (r"\boxed{6} or rather \boxed{7", "7 or 6"),  # the one that is not closed does not count
    ("5", "She sold 3 and kept 5."),  # a reference in words
    ("5", "答案是5。"),
    ("72", "Natalia sold 48/2 = 24 clips in May.\n#### 72"),
]
DIFFERENT = [
    ("73", "72"),
    ("", "72"),
    ("no number", "72"),
    ("1234567", "1234568"),
    ("1/3", "0.33"),
    (r"\boxed{5\pi}", "5"),
    (r"\boxed{5x}", "5"),
    (r"\boxed{5:30}", "30"),
    (r"\boxed{4}, and 5 is wrong", "5"),
    ("1/0", "0"),
    ("x", "x + 1"),
    ("1", "x + 1"),
    ("5 million", "5"),
]


@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_answers_that_are_equal(response, answer):
    if answer == "7 or 6":
        assert final_answer(response) == "6"
    else:
        assert score(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), DIFFERENT)
def test_answers_that_are_not_equal(response, answer):
    assert score(response, answer) == 0.0


def test_a_box_comes_before_a_mark_and_a_mark_before_the_last_number():
    assert final_answer("#### 3\n\\boxed{2} and 4") == "2"
    assert final_answer("#### 3\nbecause of 4") == "3"
    assert final_answer("#### Conclusion\nIt is 4.") == "4"
    assert final_answer("2 and 4") == "4"


def test_a_per_cent_sign_leaves_two_values():
    assert [float(value) for value in values_of("12%")] == [12, 0.12]
    assert values_of("3, 4") == () and values_of("9" * 500) == ()


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{",
        "1,",
        "1" * 9,
        "1 ",
        "####",
        "\\frac{",
        "{",
        "- ",
        "分之",
        "5\\frac{1}",
        "$ ",
        "^" + " " * 99,
        "1 x 10 ",
    ],
)
def test_every_text_is_read_in_time_that_grows_with_its_length_alone(text):
    """0.2 million characters take well under a second; a quadratic pattern takes minutes."""
    started = time.process_time()
    score(text * (200_000 // len(text)), "5")
    assert time.process_time() - started < 5
