"""`rlhf evaluate --best-of` and `--also` on prompts: each number made again here by other means."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from stages.models.base import load_base
from stages.models.candidates import open_candidates
from stages.models.roles import Roles, candidate_adapter
from stages.rollout.generate import Sampling, generate
from tests.commands import SHORT, contents, done, lines_of, refused, result, weights

SCORES = """
def letters(prompts, responses):
    return [sum(c.isalpha() for c in response) for response in responses]
def gold(prompts, responses):
    return [len(response) % 3 for response in responses]
"""


@pytest.fixture
def scores(tmp_path):
    (tmp_path / "scores.py").write_text(SCORES)
    return "--reward", f"{tmp_path}/scores.py:letters", "--gold", f"{tmp_path}/scores.py:gold"


def responses_of(candidate, prompts: list[str], draws: int, temperature: float) -> list[list[torch.Tensor]]:
    """What `rlhf evaluate --seed 0` samples, `draws` responses to each prompt."""
    from transformers import AutoTokenizer

    base = load_base(candidate.ref, device=torch.device("cpu"), dtype=torch.float32)
    roles = Roles(base)
    roles.add("policy", candidate_adapter(base, candidate))
    words = AutoTokenizer.from_pretrained(candidate.ref.tokenizer)
    out = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor(words(prompt).input_ids)
        keys = [(0, "evaluate", i), *((0, "evaluate", i, k) for k in range(1, draws))]
        with roles.use("policy"):
            out.append(generate(base, [ids] * draws, keys, (2,), Sampling(temperature, 6)))
    return out


def text_of(folder, ids: torch.Tensor) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)


# --- the best of n


@pytest.fixture(scope="module")
def best_of(chain, tmp_path_factory):
    """The best of 1, 2 and 4 on 7 prompts, and all 28 responses: (row by n, texts and tokens by prompt)."""
    place = tmp_path_factory.mktemp("best")
    (place / "scores.py").write_text(SCORES)
    found = chain()
    line = ("evaluate", "--model", found.ppo, "--dataset", found.prompts, "--limit-rows", 7, *SHORT)
    judges = ("--reward", f"{place}/scores.py:letters", "--gold", f"{place}/scores.py:gold")
    report = result(*line, *judges, "--best-of", "4,1,2", "--temperature", 0.9)
    (ppo,) = open_candidates(str(found.ppo), ("ppo",), "--model")
    prompts = [row["prompt"] for row in lines_of(found.prompts)[:7]]
    tokens = responses_of(ppo, prompts, 4, 0.9)
    return report, [[(text_of(found.ppo, ids), ids.tolist()) for ids in mine] for mine in tokens]


def best_in_every_subset(responses: list, n: int, measure) -> float:
    """The mean of a measure over all subsets of n, of the response with most letters; ties share."""
    means = []
    for subset in itertools.combinations(responses, n):
        top = max(sum(c.isalpha() for c in text) for text, _ in subset)
        best = [r for r in subset if sum(c.isalpha() for c in r[0]) == top]
        means.append(statistics.fmean(measure(r) for r in best))
    return statistics.fmean(means)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_best_of_n_is_the_mean_over_every_subset(best_of, n):
    report, responses = best_of
    (row,) = [row for row in report["best_of"] if row["n"] == n]
    measures = {
        "score": lambda r: sum(c.isalpha() for c in r[0]),
        "gold": lambda r: len(r[0]) % 3,
        "length": lambda r: len(r[1]),
        "eos_rate": lambda r: float(r[1][-1] == 2),
    }
    for name, measure in measures.items():
        by_prompt = [best_in_every_subset(mine, n, measure) for mine in responses]
        assert row[name] == pytest.approx(statistics.fmean(by_prompt)), name
        if name in ("score", "gold"):
            assert row[f"{name}_error"] == pytest.approx(statistics.stdev(by_prompt) / math.sqrt(7))


def test_rows_come_by_n_and_the_first_sample_is_the_plain_evaluation(best_of):
    report, responses = best_of
    assert [row["n"] for row in report["best_of"]] == [1, 2, 4]
    first = [sum(c.isalpha() for c in mine[0][0]) for mine in responses]
    assert report["policy"]["score"] == pytest.approx(statistics.fmean(first))
    assert report["best_of"][-1]["score"] > report["best_of"][0]["score"]


def test_repetition_is_that_of_disjoint_sets(best_of):
    """The best of 2: of responses 0 and 1, and of 2 and 3; tokens without the one that ends a response."""
    report, responses = best_of
    (row,) = [row for row in report["best_of"] if row["n"] == 2]
    found = {"duplicate_rate": [], "distinct_1": [], "distinct_2": []}
    for start in (0, 2):
        best = [max(mine[start : start + 2], key=lambda r: sum(c.isalpha() for c in r[0])) for mine in responses]
        tokens = [ids[:-1] if ids[-1] == 2 else ids for _, ids in best]
        ones, twos = [t for ids in tokens for t in ids], [p for ids in tokens for p in itertools.pairwise(ids)]
        found["duplicate_rate"].append(1 - len({text for text, _ in best}) / 7)
        found["distinct_1"].append(len(set(ones)) / len(ones))
        found["distinct_2"].append(len(set(twos)) / len(twos))
    for name, values in found.items():
        assert row[name] == pytest.approx(statistics.fmean(values)), name


def test_kl_is_the_bound_and_what_the_sampled_policy_has_already(best_of, chain, tmp_path):
    """log policy / reference of every response by transformers; then over every subset."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report, responses = best_of
    done("export", "--model", chain().sft, "--output", tmp_path / "sft")
    places = (chain().folder / "exported", tmp_path / "sft")
    models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in places]
    words = AutoTokenizer.from_pretrained(chain().ppo)
    known = {}
    for row, mine in zip(lines_of(chain().prompts), responses, strict=False):
        prompt = words(row["prompt"]).input_ids
        for place, (_, ids) in enumerate(mine):
            sums = []
            for model in models:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
                lines = (logits / 0.9).log_softmax(-1)[len(prompt) - 1 : -1]
                sums.append(float(lines.gather(1, torch.tensor(ids)[:, None]).sum()))
            known[id(mine), place] = sums[0] - sums[1]
    for row in report["best_of"]:
        by_prompt = []
        for mine in responses:
            numbered = [(text, known[id(mine), place]) for place, (text, _) in enumerate(mine)]
            by_prompt.append(best_in_every_subset(numbered, row["n"], lambda r: r[1]))
        n, own = row["n"], statistics.fmean(by_prompt)
        assert row["kl_choice"] == pytest.approx(math.log(n) - (n - 1) / n)
        assert row["kl_policy"] == pytest.approx(own, abs=2e-5)
        assert row["kl"] == pytest.approx(row["kl_choice"] + own, abs=2e-5)


def test_a_base_is_its_own_reference_so_the_bound_is_all(chain, scores):
    found = chain()
    line = ("evaluate", "--model", found.base, "--dataset", found.prompts, "--limit-rows", 3, *SHORT, *scores)
    (row,) = result(*line, "--best-of", 3)["best_of"]
    assert row["kl"] == row["kl_choice"] == pytest.approx(math.log(3) - 2 / 3) and row["kl_policy"] == 0.0


# --- several checkpoints


@pytest.fixture(scope="module")
def states(chain, tmp_path_factory):
    """PPO for 4 updates with every state kept, and its folder."""
    place, found = tmp_path_factory.mktemp("states"), chain()
    (place / "scores.py").write_text(SCORES)
    line = ("ppo", "--model", found.sft, "--reward", f"{place}/scores.py:letters", "--dataset", found.prompts)
    kept = ("--save-every", 1, "--keep-state", "--keep-states", 3, "--learning-rate", "5e-3", "--eval-fraction", "0.2")
    done(*line, "--output", place / "ppo", *kept, "--max-steps", 4, "--batch-size", 8, "--lora-rank", 4, *SHORT)
    return place / "ppo"


def frontier(found, scores, *also, model=None):
    line = ("evaluate", "--model", model or found.ppo, "--dataset", found.prompts, "--limit-rows", 9, *SHORT, *scores)
    return result(*line, *itertools.chain(*(("--also", place) for place in also)))


@pytest.mark.full
def test_every_row_is_the_evaluation_of_that_checkpoint_alone(chain, scores):
    found = chain()
    report = frontier(found, scores, found.sft, found.base)
    rows = {row["model"]: row for row in report["frontier"]}
    assert list(rows) == sorted(rows, key=lambda name: rows[name]["kl"])
    assert set(rows) == {str(found.ppo), str(found.sft), str(found.base)}
    for name in rows:
        line = ("evaluate", "--model", name, "--reference", found.sft, "--dataset", found.prompts, *SHORT, *scores)
        alone = result(*line, "--limit-rows", 9, "--temperature", 0.7)["policy"]
        assert {key: rows[name][key] for key in alone} == alone
    assert rows[str(found.sft)]["kl"] == 0.0 and report["policy"].items() <= rows[str(found.ppo)].items()


@pytest.mark.full
def test_the_states_of_a_run_are_policies_of_their_own(chain, states, scores):
    """The last state is the checkpoint itself; the others are what the run was before."""
    report = frontier(chain(), scores, states / "state", model=states)
    rows = {row["label"]: row for row in report["frontier"]}
    assert set(rows) == {"ppo", "ppo step 2", "ppo step 3", "ppo step 4"}
    last = {key: value for key, value in rows["ppo step 4"].items() if key not in ("model", "label")}
    assert last.items() <= rows["ppo"].items()
    assert len({rows[label]["kl"] for label in rows}) == 3
    assert rows["ppo step 2"]["model"] == str(states / "state" / "step-000002")


@pytest.mark.full
def test_an_unfinished_run_has_the_states_of_a_finished_one(chain, states, scores, tmp_path, monkeypatch):
    """Killed after its third update: its states are those that the whole run had, weights and all."""
    from stages.checkpoint.run import Run

    whole, log = frontier(chain(), scores, states / "state", model=states), Run.log
    place = tmp_path / "ppo"

    def log_until_killed(run, step, metrics):
        log(run, step, metrics)
        if step == 3:
            shutil.copytree(run.folder, place)

    shutil.copy(states.parent / "scores.py", tmp_path)
    line = ("ppo", "--model", chain().sft, "--reward", f"{tmp_path}/scores.py:letters", "--dataset", chain().prompts)
    more = ("--save-every", 1, "--learning-rate", "5e-3", "--eval-fraction", "0.2", "--max-steps", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_until_killed)
        done(*line, "--output", tmp_path / "x", *more, "--batch-size", 8, "--lora-rank", 4, *SHORT)
    report = frontier(chain(), scores, place / "state", model=states)
    rows = {row["label"]: row for row in report["frontier"]}
    assert set(rows) == {"ppo", "ppo step 1", "ppo step 2"}
    (same,) = [row for row in whole["frontier"] if row["label"] == "ppo step 2"]
    assert {k: v for k, v in rows["ppo step 2"].items() if k != "model"} == {
        k: v for k, v in same.items() if k != "model"
    }
    said = refused("evaluate", "--model", states, "--also", place, "--dataset", chain().prompts, *SHORT)
    assert "is an unfinished run" in said and f"{place}/state" in said


@pytest.mark.full
def test_the_weights_of_a_state_are_the_checkpoints(chain, states, open_tiny):
    (candidate,) = open_candidates(str(states / "state" / "step-000004"), ("ppo",), "--also")
    adapter = candidate_adapter(open_tiny(), candidate)
    stored = {k.partition(":")[2]: v for k, v in weights(states).items() if k.startswith("adapter_model")}
    mine = adapter.tensors()
    assert mine.keys() == stored.keys() and all(torch.equal(mine[name], stored[name]) for name in mine)
    assert not any(p.requires_grad for p in adapter.parameters())


@pytest.mark.full
def test_keep_states_says_how_many(states):
    assert sorted(p.name for p in (states / "state").iterdir()) == ["step-000002", "step-000003", "step-000004"]


@pytest.mark.full
def test_a_damaged_state_is_refused(chain, states, scores, tmp_path):
    shutil.copytree(states, tmp_path / "ppo")
    file = tmp_path / "ppo" / "state" / "step-000003" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    line = ("evaluate", "--model", states, "--dataset", chain().prompts, *SHORT)
    assert "state.safetensors is not what was saved" in refused(*line, "--also", tmp_path / "ppo" / "state")


@pytest.mark.full
def test_a_picture_of_both(chain, scores, tmp_path):
    found = chain()
    before = contents(found.folder)
    line = (
        "evaluate",
        "--model",
        found.sft,
        "--also",
        found.ppo,
        "--dataset",
        found.prompts,
        "--limit-rows",
        6,
        *SHORT,
    )
    more = ("--best-of", "1,2", "--plot", tmp_path / "new" / "x.svg")
    ended = done(*line, *scores, *more)
    names = {e.text for e in ElementTree.parse(tmp_path / "new" / "x.svg").iter() if e.tag.endswith("text")}
    assert {"score, checkpoints", "gold, checkpoints", "score, best of n", "gold, best of n"} <= names
    words = ended.stdout.split("by KL to the reference")[1].split("over-optimisation")[0]
    assert all(name in words for name in ("sft", "ppo", "best of 1", "best of 2"))
    done(*line, *scores, *more)  # over its own file
    assert contents(found.folder) == before


def test_other_sampling_than_in_training_is_told(chain, scores):
    found = chain()
    line = ("evaluate", "--model", found.sft, "--also", found.ppo, "--dataset", found.prompts, "--limit-rows", 2)
    said = done(*line, *SHORT, *scores).stderr
    assert (
        f"{found.ppo} was trained at temperature 0.7; all are measured at temperature 1, max_response_tokens 6" in said
    )


# --- what makes no sense


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--best-of", "2"), ["--best-of", "--reward"]),
        (("--best-of", "2,0", "--reward", "R"), ["--best-of: 0 is too small"]),
        (("--best-of", "2;3", "--reward", "R"), ["--best-of", "such as 1,2,4"]),
        (("--also", "R"), ["--also", "no policy", "--reward"]),
        (("--also", "S/state"), ["--also: ", "state holds no state", "--keep-state"]),
        (("--plot", "x.svg", "--reward", "R"), ["error: --plot needs at least two points"]),
        (("--plot", "x.svg", "--also", "S"), ["error: --plot needs scores"]),
        (("--plot", "x.jpg", "--also", "S", "--reward", "R"), ["--plot: x.jpg does not end in .svg or .png or .pdf"]),
        (("--plot", "D", "--also", "S", "--reward", "R"), ["--plot", "does not end in .svg"]),
    ],
)
def test_what_is_refused_before_a_model_loads(chain, monkeypatch, more, words):
    found = chain()
    names = {"R": str(found.reward), "S": str(found.sft), "S/state": f"{found.sft}/state", "D": str(found.prompts)}
    monkeypatch.setattr("stages.training.opening.load_base", None)
    said = refused("evaluate", "--model", found.ppo, "--dataset", found.prompts, *(names.get(m, m) for m in more))
    assert all(word in said for word in words), said


def test_a_plot_without_matplotlib_is_refused_before_a_model_loads(chain, monkeypatch, tmp_path):
    monkeypatch.setattr("stages.training.opening.load_base", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    line = ("evaluate", "--model", chain().ppo, "--dataset", chain().prompts, "--reward", chain().reward)
    said = refused(*line, "--best-of", "1,2", "--plot", tmp_path / "x.svg")
    assert "--plot: matplotlib is not installed" in said and "pip install 'rlhf[plot]'" in said
    assert not (tmp_path / "x.svg").exists()


def test_somebody_elses_picture_is_not_drawn_over(chain, scores, tmp_path):
    (tmp_path / "x.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    line = ("evaluate", "--model", chain().ppo, "--dataset", chain().prompts, "--also", chain().sft, *scores)
    assert "will not be overwritten" in refused(*line, "--plot", tmp_path / "x.svg")


def test_demonstrations_are_answered_only_for_a_score(chain):
    line = ("evaluate", "--model", chain().ppo, "--dataset", chain().demonstrations, "--also", chain().sft)
    assert "--also compares responses to prompts" in refused(*line)
