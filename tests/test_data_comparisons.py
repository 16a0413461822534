"""Comparisons: which texts are compared, in which direction, and what is no comparison at all."""

from __future__ import annotations

import json

import pytest

from stages.data.comparisons import (
    Comparison,
    Pair,
    Rating,
    annotator_agreement,
    compare_chosen,
    compare_ranked,
    compare_ratings,
    compare_without_prompt,
    normalise_ratings,
    read_rating,
    shared_text,
)
from stages.data.raw_rows import RawRow
from stages.data.rows import read_comparisons
from stages.errors import DatasetError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def row(**values):
    return RawRow(values, "f.jsonl:7")


def refuse(build, **values):
    with pytest.raises(DatasetError) as caught:
        build(row(**values))
    assert "--skip-bad-rows" in caught.value.fix
    return caught.value.where, caught.value.what


# --- prompt, chosen, rejected -------------------------------------------------------------------------------------


def test_a_text_comparison_prefers_the_chosen_response():
    found = compare_chosen(row(prompt="Q", chosen=" yes", rejected=" no\n"))
    assert found == Comparison("f.jsonl:7", "Q", (" yes", " no\n"), (Pair(0, 1, 1.0, 0.0),))


def test_margin_and_probability_are_kept():
    found = compare_chosen(row(prompt="Q", chosen="a", rejected="b", margin="1.5", probability=0.8))
    assert found.pairs == (Pair(better=0, worse=1, probability=0.8, margin=1.5),)


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        ({"probability": 0.25}, (1, 0, 0.75, 0.0)),
        ({"probability": 0.25, "margin": 1.5}, (1, 0, 0.75, -1.5)),  # chosen + 1.5 over rejected, as the row says
        ({"probability": 0.25, "margin": -1.5}, (1, 0, 0.75, 1.5)),  # the row of 0.75 and 1.5, written the other way
        ({"probability": 0}, (1, 0, 1.0, 0.0)),
        ({"probability": 0.5, "margin": 1.5}, (0, 1, 0.5, 1.5)),
    ],
)
def test_a_label_below_a_half_prefers_the_rejected_response(given, pair):
    (found,) = compare_chosen(row(prompt="Q", chosen="a", rejected="b", **given)).pairs
    assert (found.better, found.worse, found.probability, found.margin) == pair


def test_an_empty_margin_or_probability_is_as_good_as_none():
    found = compare_chosen(row(prompt="Q", chosen="a", rejected="b", margin=None, probability=""))
    assert found.pairs == (Pair(0, 1),)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("margin", -1, "`chosen` is preferred, but its margin over `rejected` is negative, -1"),
        ("margin", "much", "expected a number, found the text 'much'"),
        ("probability", 1.2, "a probability must be between 0 and 1, found 1.2"),
        ("probability", -0.1, "a probability must be between 0 and 1, found -0.1"),
    ],
)
def test_impossible_margins_and_probabilities_are_refused(field, value, what):
    where = f"f.jsonl:7: {field}"
    assert refuse(compare_chosen, prompt="Q", chosen="a", rejected="b", **{field: value}) == (where, what)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_blank_text_is_refused(field):
    values = {"prompt": "Q", "chosen": "a", "rejected": "b", field: " "}
    assert refuse(compare_chosen, **values) == (f"f.jsonl:7: {field}", "the text is empty")


def test_chosen_and_rejected_must_differ():
    expected = ("f.jsonl:7: rejected", "`chosen` and `rejected` are the same")
    assert refuse(compare_chosen, prompt="Q", chosen="a", rejected="a") == expected
    assert refuse(compare_chosen, prompt=[user("Q")], chosen="a", rejected=[assistant("a")]) == expected
    assert refuse(compare_without_prompt, chosen="a b", rejected="a b") == expected


def test_message_prompts_take_messages_or_texts_as_responses():
    found = compare_chosen(row(prompt=[user("Q")], chosen=[assistant("a")], rejected="b"))
    assert found.prompt == (user("Q"),)
    assert found.responses == ((assistant("a"),), (assistant("b"),))


def test_a_prompt_that_the_responses_repeat_is_taken_off_them():
    prompt = [{"role": "system", "content": "S"}, user("Q")]
    found = compare_chosen(row(prompt=prompt, chosen=[*prompt, assistant("a")], rejected=[assistant("b")]))
    assert found.prompt == tuple(prompt)
    assert found.responses == ((assistant("a"),), (assistant("b"),))


def test_a_text_prompt_with_message_responses_is_refused():
    where, what = refuse(compare_chosen, prompt="Q", chosen=[assistant("a")], rejected=[assistant("b")])
    assert where == "f.jsonl:7: chosen"
    assert "the prompt is text but the response is messages" in what
    where, _ = refuse(compare_chosen, prompt="Q", chosen="a", rejected=[assistant("b")])
    assert where == "f.jsonl:7: rejected"


def test_a_text_prompt_that_only_repeats_the_shared_messages_is_understood():
    found = compare_chosen(row(prompt="Q", chosen=[user("Q"), assistant("a")], rejected=[user("Q"), assistant("b")]))
    assert found.prompt == (user("Q"),)
    assert found.responses == ((assistant("a"),), (assistant("b"),))
    where, what = refuse(
        compare_chosen, prompt="R", chosen=[user("Q"), assistant("a")], rejected=[user("Q"), assistant("b")]
    )
    assert (where, what[:18]) == ("f.jsonl:7: chosen", "the prompt is text")


def test_a_prompt_that_ends_with_the_assistant_is_refused():
    where, what = refuse(compare_chosen, prompt=[user("Q"), assistant("A")], chosen="a", rejected="b")
    assert where == "f.jsonl:7: prompt"
    assert "ends with an assistant turn" in what


@pytest.mark.parametrize("response", [[user("Q")], [assistant("a"), user("more")], [assistant(" ")]])
def test_a_response_must_end_with_the_assistant_saying_something(response):
    where, what = refuse(compare_chosen, prompt=[user("Q")], chosen=[assistant("a")], rejected=response)
    assert where == "f.jsonl:7: rejected"
    assert "does not end with an assistant turn" in what


# --- the shared beginning as prompt -------------------------------------------------------------------------------


def test_hh_texts_are_cut_after_the_last_assistant_turn_they_share():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:"
    found = compare_without_prompt(row(chosen=start + " I see", rejected=start + " I do not"))
    assert found.prompt == start
    assert found.responses == (" I see", " I do not")


def test_hh_texts_that_part_early_keep_the_later_turns_as_response():
    start = "\n\nHuman: Hi\n\nAssistant:"
    found = compare_without_prompt(row(chosen=f"{start} A\n\nHuman: x\n\nAssistant: C", rejected=f"{start} B"))
    assert found.prompt == start
    assert found.responses == (" A\n\nHuman: x\n\nAssistant: C", " B")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the cat sat", "the cart", "the"),  # "ca" is shared, but only half a word
        ("the cat sat", "the dog", "the"),  # the space belongs to the word that follows
        ("Q?\nyes", "Q?\nno", "Q?"),
        ("one", "other", ""),
        ("a", "b", ""),
        ("a b c", "a b", "a"),
    ],
)
def test_other_texts_are_cut_at_a_whole_word(chosen, rejected, prompt):
    assert shared_text(chosen, rejected) == prompt


@pytest.mark.parametrize(("chosen", "rejected"), [("one", "other"), (" a", " b"), ("  x", "  y")])
def test_texts_without_a_shared_beginning_are_refused(chosen, rejected):
    where, what = refuse(compare_without_prompt, chosen=chosen, rejected=rejected)
    assert where == "f.jsonl:7: chosen"
    assert "share no beginning" in what


def test_a_text_that_ends_where_the_prompt_does_is_refused():
    start = "\n\nHuman: Hi\n\nAssistant:"
    where, what = refuse(compare_without_prompt, chosen=f"{start} A", rejected=start)
    assert (where, what) == ("f.jsonl:7: rejected", "the text after the shared prompt is empty")


def test_conversations_share_their_leading_messages():
    shared = [user("Q"), assistant("A"), user("R")]
    found = compare_without_prompt(row(chosen=[*shared, assistant("a")], rejected=[*shared, assistant("b")]))
    assert found.prompt == tuple(shared)
    assert found.responses == ((assistant("a"),), (assistant("b"),))


def test_a_shared_prompt_never_ends_with_the_assistant():
    chosen = [user("Q"), assistant("A"), user("x"), assistant("a")]
    rejected = [user("Q"), assistant("A"), user("y"), assistant("b")]
    found = compare_without_prompt(row(chosen=chosen, rejected=rejected))
    assert found.prompt == (user("Q"),)
    assert found.responses == (tuple(chosen[1:]), tuple(rejected[1:]))


def test_conversations_without_a_shared_beginning_or_of_two_forms_are_refused():
    where, what = refuse(compare_without_prompt, chosen=[user("Q"), assistant("a")], rejected=[assistant("b")])
    assert (where, "share no beginning" in what) == ("f.jsonl:7: chosen", True)
    where, what = refuse(compare_without_prompt, chosen=[user("Q"), assistant("a")], rejected="Q b")
    assert (where, "both be text or both be messages" in what) == ("f.jsonl:7: rejected", True)


def test_a_conversation_that_ends_where_the_other_goes_on_is_refused():
    where, _ = refuse(compare_without_prompt, chosen=[user("Q"), assistant("a")], rejected=[user("Q")])
    assert where == "f.jsonl:7: rejected"


# --- ranked lists -------------------------------------------------------------------------------------------------


def test_ranks_give_every_pair_and_rank_one_is_best():
    found = compare_ranked(row(prompt="Q", responses=["a", "b", "c"], ranks=[2, 3, 1]))
    assert found.responses == ("a", "b", "c")
    assert found.pairs == (Pair(0, 1), Pair(2, 0), Pair(2, 1))


def test_equal_ranks_are_ties():
    found = compare_ranked(row(prompt="Q", responses=["a", "b", "c"], ranks=[1, 2, 1]))
    assert found.pairs == (Pair(0, 1), Pair(2, 1))


def test_ranked_responses_may_be_messages():
    found = compare_ranked(row(prompt=[user("Q")], responses=["a", [assistant("b")]], ranks=[2, 1]))
    assert found.responses == ((assistant("a"),), (assistant("b"),))
    assert found.pairs == (Pair(1, 0),)


@pytest.mark.parametrize(
    ("responses", "ranks", "where", "what"),
    [
        (["a", "b"], [1], "ranks", "the row has 2 responses but 1 rank"),
        (["a", "b"], [1, 1], "ranks", "at least two different ranks"),
        (["a"], [1], "ranks", "at least two different ranks"),
        ([], [], "ranks", "at least two different ranks"),
        (["a", "b"], [1, "best"], "ranks[1]", "expected a number"),
        (["a", " "], [1, 2], "responses[1]", "the text is empty"),
        (["a", None], [1, 2], "responses[1]", "expected text, found null"),
        ("a", [1], "responses", "expected a list"),
        (["a", "b"], "1,2", "ranks", "expected a list"),
        (["a", "b", "a"], [1, 2, 3], "responses", "responses 1 and 3 are the same, but not their ranks"),
    ],
)
def test_bad_ranked_lists_are_refused(responses, ranks, where, what):
    found = refuse(compare_ranked, prompt="Q", responses=responses, ranks=ranks)
    assert found[0] == f"f.jsonl:7: {where}"
    assert found[1].startswith(what)


# --- ratings ------------------------------------------------------------------------------------------------------


def rating(prompt, response, number, annotator=None, where="f"):
    return Rating(where, prompt, response, number, annotator)


def test_a_rating_row_is_read_with_its_annotator():
    found = read_rating(row(prompt="Q", response=" a", rating="4", annotator=7))
    assert found == Rating("f.jsonl:7", "Q", " a", 4.0, "7")
    assert read_rating(row(prompt="Q", response="a", rating=4)).annotator is None


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("rating", None, "expected a number, found null"),
        ("rating", "good", "expected a number, found the text 'good'"),
        ("response", "", "the text is empty"),
        ("annotator", ["x"], "expected a name or a number, found a list"),
    ],
)
def test_bad_rating_rows_are_refused(field, value, what):
    values = {"prompt": "Q", "response": "a", "rating": 1, "annotator": "x", field: value}
    assert refuse(read_rating, **values) == (f"f.jsonl:7: {field}", what)


def test_ratings_are_compared_within_a_prompt_in_order_of_appearance():
    found, problems = compare_ratings(
        [
            rating("Q", "a", 1.0, where="f:1"),
            rating("R", "x", 2.0, where="f:2"),
            rating("Q", "b", 4.0, where="f:3"),
            rating("R", "y", 1.5, where="f:4"),
            rating("Q", "c", 2.0, where="f:5"),
        ],
        0.0,
    )
    assert problems == []
    assert found == [
        Comparison("f:1", "Q", ("a", "b", "c"), (Pair(1, 0, 1.0, 3.0), Pair(2, 0, 1.0, 1.0), Pair(1, 2, 1.0, 2.0))),
        Comparison("f:2", "R", ("x", "y"), (Pair(0, 1, 1.0, 0.5),)),
    ]


def test_ratings_of_one_response_are_averaged_first():
    found, _ = compare_ratings([rating("Q", "a", 1.0), rating("Q", "b", 2.0), rating("Q", "a", 5.0)], 0.0)
    assert found[0].responses == ("a", "b")
    assert found[0].pairs == (Pair(0, 1, 1.0, 1.0),)  # (1 + 5) / 2 = 3 against 2


def test_differences_up_to_the_threshold_are_ties_and_uncompared_responses_go():
    ratings = [rating("Q", "a", 3.0), rating("Q", "b", 5.0), rating("Q", "c", 4.0)]
    found, problems = compare_ratings(ratings, 1.0)
    assert found[0].responses == ("a", "b")
    assert found[0].pairs == (Pair(1, 0, 1.0, 2.0),)
    assert problems == []
    found, problems = compare_ratings(ratings, 2.0)
    assert found == []
    assert problems == ["f: no two responses to this prompt differ enough in rating"]


def test_message_prompts_are_grouped_by_content():
    one, other = (user("Q"),), (user("R"),)
    ratings = [rating(p, (assistant(r),), n) for p, r, n in [(one, "a", 1.0), (other, "x", 1.0), (one, "b", 2.0)]]
    found, problems = compare_ratings(ratings, 0.0)
    assert [c.prompt for c in found] == [one]
    assert found[0].responses == ((assistant("a"),), (assistant("b"),))
    assert len(problems) == 1


def test_z_scores_are_per_annotator():
    ratings = [
        rating("Q", "a", 1.0, "strict"),
        rating("Q", "b", 3.0, "strict"),
        rating("Q", "a", 9.0, "kind"),
        rating("Q", "b", 9.0, "kind"),
    ]
    assert [r.rating for r in normalise_ratings(ratings)] == [-1.0, 1.0, 0.0, 0.0]  # strict: mean 2, deviation 1


def test_annotators_agree_where_they_prefer_the_same_of_two():
    ratings = [
        *(rating("Q", r, n, "x") for r, n in (("a", 1), ("b", 2), ("c", 3))),  # c > b > a
        *(rating("Q", r, n, "y") for r, n in (("a", 5), ("b", 9), ("b", 7), ("c", 7))),  # b (8) > c > a
        *(rating("Q", r, n, "z") for r, n in (("a", 4), ("b", 4))),  # no preference
        *(rating("R", r, n, "x") for r, n in (("a", 1), ("b", 2))),
        *(rating("R", r, n, None) for r, n in (("a", 2), ("b", 1))),  # nobody knows whose these are
    ]
    assert annotator_agreement(ratings, 0) == (2, 3)  # x and y: on a-b and a-c, not on b-c
    assert annotator_agreement(ratings, 1.0) == (1, 1)  # x tells a from c alone by more than 1


def test_agreement_counts_prompts_whose_ratings_cancel_out(tmp_path):
    rows = [("Q", "a", 1, "x"), ("Q", "b", 2, "x"), ("Q", "a", 2, "y"), ("Q", "b", 1, "y")]
    rows += [("R", "a", 1, "x"), ("R", "b", 2, "x"), ("R", "a", 1, "y"), ("R", "b", 3, "y")]
    found = read_comparisons(write_ratings(tmp_path, rows))
    assert len(found.rows) == 1 and found.agreement == (1, 2)


def write_ratings(folder, rows):
    path = folder / "ratings.jsonl"
    keys = ("prompt", "response", "rating", "annotator")
    path.write_text("".join(json.dumps(dict(zip(keys, r, strict=False))) + "\n" for r in rows))
    return str(path)


def test_a_rating_file_becomes_comparisons_and_lone_prompts_are_counted(tmp_path):
    path = write_ratings(tmp_path, [("Q", "a", 1), ("R", "x", 5), ("Q", "b", 4), ("S", "y", 2), ("S", "z", 2)])
    found = read_comparisons(path)
    assert found.kind == "rating"
    assert found.rows == [Comparison(f"{path}:1", "Q", ("a", "b"), (Pair(1, 0, 1.0, 3.0),))]
    assert found.skipped == 2
    assert [problem.split(": ")[0] for problem in found.problems] == [f"{path}:2", f"{path}:4"]


def test_normalising_raters_can_turn_a_verdict(tmp_path):
    # x alone prefers b, by much: raw means are a (0+6+6)/3 = 4, b (10+4+4)/3 = 6.
    # Every rater's z-scores are -1 and 1: a (-1+1+1)/3 = 1/3, b (1-1-1)/3 = -1/3.
    rows = [("Q", "a", 0, "x"), ("Q", "b", 10, "x")]
    rows += [("Q", "a", 6, "y"), ("Q", "b", 4, "y"), ("Q", "a", 6, "z"), ("Q", "b", 4, "z")]
    path = write_ratings(tmp_path, rows)
    assert read_comparisons(path).rows[0].pairs == (Pair(1, 0, 1.0, 2.0),)
    (pair,) = read_comparisons(path, normalise_raters=True).rows[0].pairs
    assert (pair.better, pair.worse) == (0, 1)
    assert pair.margin == pytest.approx(2 / 3)


def test_normalising_raters_needs_annotators(tmp_path):
    path = write_ratings(tmp_path, [("Q", "a", 1), ("Q", "b", 2)])
    with pytest.raises(DatasetError) as caught:
        read_comparisons(path, normalise_raters=True)
    assert caught.value.where == f"{path}:1: annotator"


def test_ratings_that_all_tie_are_an_error(tmp_path):
    path = write_ratings(tmp_path, [("Q", "a", 1), ("Q", "b", 2)])
    with pytest.raises(DatasetError, match="differ by more than 1 in rating"):
        read_comparisons(path, rating_threshold=1.0)


def test_limit_rows_counts_comparisons_and_not_ratings(tmp_path):
    path = write_ratings(tmp_path, [("Q", "a", 1), ("R", "x", 1), ("Q", "b", 2), ("R", "y", 2), ("Q", "c", 3)])
    found = read_comparisons(path, limit_rows=1)
    assert [c.prompt for c in found.rows] == ["Q"]
    assert found.rows[0].responses == ("a", "b", "c")
