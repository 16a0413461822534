"""Sequence classifiers of other tools as reward models: the scores that transformers gives, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.data.comparisons import Comparison
from stages.errors import CheckpointError, ModelError
from stages.models.candidates import SCORERS
from stages.models.classifier import load_classifier
from stages.models.classifier_text import ClassifierText
from stages.models.model_ref import open_model
from stages.models.passes import Passes
from tests.commands import SHORT, SMALL, comparisons, done, lines_of, refused, result, rlhf
from tests.foreign import build_classifier, edit_json, score_by_hand
from tests.tiny import build_tokenizer, write_jsonl

PAIRS = [("the cat", " sat"), ("what is the time?", " it is noon, thank you very much! " * 3), ("a", "b"), ("", " x y")]


def open_classifier(folder):
    return open_model(str(folder), stages=SCORERS, what="--reward")


def scores_of(folder, pairs=PAIRS, *, as_messages=False, passes=None):
    ref = open_classifier(folder)
    model = load_classifier(ref, device=torch.device("cpu"), dtype=torch.float32, passes=passes or Passes(False))
    reader = ClassifierText(ref)
    if as_messages:
        pairs = [(({"role": "user", "content": p},), ({"role": "assistant", "content": r},)) for p, r in pairs]
    return model.scores([reader.read("here", *pair) for pair in pairs]).tolist(), reader


def as_chat(pairs=PAIRS):
    return [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]


@pytest.mark.parametrize(
    ("kind", "side", "padding"),
    [
        ("llama", "left", 0),
        ("llama", "right", None),
        ("llama", "left", 2),
        ("gpt2", "left", None),
        ("gpt2", "right", -1),
    ],
)
def test_a_decoder_scores_joined_texts_as_by_hand(tmp_path, kind, side, padding):
    """Whatever the padding side and token, in one batch of mixed lengths or one by one."""
    folder = build_classifier(tmp_path, kind, side=side, pad_token_id=padding)
    expected = score_by_hand(folder, [(prompt + response,) for prompt, response in PAIRS])
    scores, reader = scores_of(folder)
    assert scores == pytest.approx(expected, abs=1e-5) and "joined as one text" in reader.description
    assert scores_of(folder, passes=Passes(False, 1))[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_encoder_scores_pairs_as_by_hand(tmp_path, kind):
    folder = build_classifier(tmp_path, kind)
    scores, reader = scores_of(folder)
    assert scores == pytest.approx(score_by_hand(folder, PAIRS), abs=1e-5) and "pair of texts" in reader.description
    assert scores_of(folder, as_messages=True)[0] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_chat_template_of_its_own_is_used_for_text_and_messages(tmp_path, kind):
    folder = build_classifier(tmp_path, kind, chat=True)
    expected = score_by_hand(folder, as_chat())
    for as_messages in (False, True):
        scores, reader = scores_of(folder, as_messages=as_messages)
        assert scores == pytest.approx(expected, abs=1e-5) and "its own chat template" in reader.description


def test_messages_without_a_template_are_read_with_their_speakers(tmp_path):
    folder = build_classifier(tmp_path)
    expected = score_by_hand(folder, [(f"Human: {p}\n\nAssistant: {r}",) for p, r in PAIRS])
    assert scores_of(folder, as_messages=True)[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_long_text_is_cut_as_its_tokenizer_cuts_it(tmp_path, kind):
    folder = build_classifier(tmp_path, kind, context=16)
    texts = [(p + r,) for p, r in PAIRS] if kind == "llama" else PAIRS
    expected = score_by_hand(folder, texts, truncation=True, max_length=16)
    scores, reader = scores_of(folder)
    assert scores == pytest.approx(expected, abs=1e-5) and reader.context == 16
    assert [reader.read("here", *pair).cut for pair in PAIRS] == [False, True, False, False]
    rows = reader.comparison(Comparison("here", *[PAIRS[0][0], (" sat", " it is noon" * 9)], ()), 8)
    assert [row.size for row in rows] == [min(8, row.size) for row in rows] and rows[1].cut


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 6}}])
def test_an_adapter_of_a_classifier_scores_as_in_transformers(model_folder, tmp_path, settings):
    """As TRL's RewardTrainer saves it, beside a tokenizer with a chat template."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    def save(labels, folder):
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"), num_labels=labels)
        about = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"}
        model = get_peft_model(model, LoraConfig(**about | settings))
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.data.normal_(0, 0.1)
        model.save_pretrained(folder)
        return folder

    folder = save(1, tmp_path / "one")
    build_tokenizer(folder, chat=True)
    expected = score_by_hand(folder, as_chat(), num_labels=1)
    scores, reader = scores_of(folder)
    assert scores == pytest.approx(expected, abs=2e-5) and "its own chat template" in reader.description
    assert open_classifier(folder).digest != open_classifier(model_folder("llama")).digest
    with pytest.raises(CheckpointError, match="has 2 labels"):
        open_classifier(save(2, tmp_path / "two"))


def without_score(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "score" not in n}, folder / "model.safetensors", {"format": "pt"})


def piped(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


REFUSED = {
    "three labels": (lambda f: edit_json(f / "config.json", id2label={"0": "a", "1": "b", "2": "c"}), "has 3 labels"),
    "no label": (lambda f: edit_json(f / "config.json", id2label={}), "has no label"),
    "labels not said": (lambda f: edit_json(f / "config.json", id2label=None), "has 2 labels"),
    "code": (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "x.Y"}), "never run in a reward model"),
    "a class of its own": (lambda f: edit_json(f / "config.json", architectures=["MyRewardModel"]), "MyRewardModel"),
    "a bias of another kind": (lambda f: edit_json(f / "config.json", score_bias="1"), "score_bias in its config.json"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights"),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}), "quantised"),
    "a pipe": (piped, "a named pipe"),
    "no score layer": (without_score, "its weights lack score.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_reward_model_is_refused(tmp_path, name):
    folder = build_classifier(tmp_path)
    spoil, words = REFUSED[name]
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        scores_of(folder)
    assert words in caught.value.what and caught.value.fix, caught.value


@pytest.mark.full
def test_evaluate_compares_classifiers_with_checkpoints(chain, tmp_path):
    """Each in its own tokens; a row's scores by hand; and no sampling from a classifier."""
    c = chain("llama")
    bert, rows = build_classifier(tmp_path / "bert", "bert"), comparisons()[:40]
    line = ("evaluate", "--dataset", write_jsonl(tmp_path / "c.jsonl", rows), "--model")
    both = result(*line, bert, "--also", c.reward, "--also", build_classifier(tmp_path / "llama", chat=True))
    one, ours, other = both["compared"]
    expected = score_by_hand(bert, [(row["prompt"], row["chosen"]) for row in rows])
    assert one["score_chosen_mean"] == pytest.approx(sum(expected) / 40, abs=1e-5)
    expected = score_by_hand(tmp_path / "llama", as_chat([(row["prompt"], row["chosen"]) for row in rows]))
    assert other["score_chosen_mean"] == pytest.approx(sum(expected) / 40, abs=1e-5)
    assert ours["score_chosen_mean"] == result(*line, c.reward)["reward_model"]["score_chosen_mean"]
    assert both["reward_model"]["accuracy"] == one["accuracy"] and 0 <= ours["agreement"] <= 1
    assert "measured on comparisons" in refused("evaluate", "--model", bert, "--dataset", c.prompts)
    assert "a sequence classifier" in refused("evaluate", "--model", c.sft, "--also", bert, "--dataset", c.prompts)
    assert "--load-in-4bit" in refused(*line, bert, "--load-in-4bit")


@pytest.mark.full
def test_ppo_learns_from_classifiers_and_measures_by_one(chain, tmp_path):
    """Weighted beside each other; the score of a held-out response by hand; cut texts are counted."""
    c = chain("llama")
    bert, llama = build_classifier(tmp_path / "bert", "bert", context=12), build_classifier(tmp_path / "llama", "llama")
    rewards = ("--reward", f"{bert}=0.5", "--reward", f"{llama}=2")
    line = ("ppo", "--model", c.sft, *rewards, "--dataset", c.prompts, "--output", tmp_path / "ppo", *SMALL, *SHORT)
    ended = done(*line)
    assert "as a pair of texts" in ended.stderr and "joined as one text" in ended.stderr
    assert "texts were cut to its 12 tokens" in ended.stderr and "texts cut to its context" in ended.stderr
    for row in lines_of(tmp_path / "ppo/samples.jsonl")[:4]:
        pair = (row["prompt"], row["response"])
        (half,) = score_by_hand(bert, [pair], truncation=True, max_length=12)
        (double,) = score_by_hand(llama, [(pair[0] + pair[1],)])
        assert row["score"] == pytest.approx(0.5 * half + 2 * double, abs=1e-4)
    gold = rlhf(
        "evaluate", "--model", c.ppo, "--gold", llama, "--dataset", c.prompts, "--limit-rows", 4, "--json", *SHORT
    )
    for row in gold.json["examples"]:
        assert row["gold"] == pytest.approx(score_by_hand(llama, [(row["prompt"] + row["response"],)])[0], abs=1e-5)


@pytest.mark.full
def test_a_classifier_chooses_the_best_of_several_beside_a_built_in_function(chain, tmp_path):
    """The smaller of both scores, each by hand; the classifier says how it reads, and what it had to cut."""
    c, folder = chain("llama"), build_classifier(tmp_path / "reader", "llama", context=12)
    line = ("sample", "--model", c.sft, "--dataset", c.prompts, "--limit-rows", 6, "--max-response-tokens", 6)
    rewards = ("--reward", f"{folder}=0.5", "--reward", "builtin:length:4:words", "--reward-combine", "min")
    ended = done(*line, "--best-of", 3, *rewards, "--output", tmp_path / "best.jsonl")
    assert "joined as one text" in ended.stderr and "texts cut to its context" in ended.stderr
    for row in lines_of(tmp_path / "best.jsonl"):
        (score,) = score_by_hand(folder, [(row["prompt"] + row["completion"],)], truncation=True, max_length=12)
        words = len(row["completion"].split())
        length = min(words, 4) / max(words, 4)
        assert row["scores"] == pytest.approx({"reader": score, "length": length}, abs=1e-5)
        assert row["score"] == pytest.approx(min(0.5 * score, length), abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("chat", [False, True])
def test_an_exported_reward_model_comes_back_with_the_scores_of_its_checkpoint(chain, chat, tmp_path):
    """On comparisons, and on responses whether they ended or not; bias included. transformers alone lacks the bias."""
    c = chain("llama", chat=chat)
    exported = c.folder / "exported_reward"
    ours, theirs = (
        result("evaluate", "--model", name, "--dataset", c.comparisons, "--limit-rows", 64)["reward_model"]
        for name in (c.reward, exported)
    )
    for name in ("score_chosen_mean", "score_rejected_mean", "score_chosen_std", "accuracy", "score_length_corr"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-5), name
    line = ("evaluate", "--model", c.sft, "--reward", c.reward, "--dataset", c.prompts, "--examples", 64, *SHORT)
    scored = result(*line, "--gold", exported)["examples"]
    assert all(row["gold"] == pytest.approx(row["score"], abs=1e-5) for row in scored) and len(scored) == 64
    other = shutil.copytree(c.base, tmp_path / "base")  # another policy: its tokens are not those of the reward model
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["q"], words["z"] = words["z"], words["q"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    done("evaluate", "--model", other, "--gold", exported, "--dataset", c.prompts, "--limit-rows", 4, *SHORT)


@pytest.mark.full
def test_transformers_loads_our_reward_checkpoint_without_its_bias(chain):
    """With num_labels 1 it gives the score minus the bias of head.safetensors."""
    from transformers import AutoModelForSequenceClassification

    c = chain("llama")
    bias = float(load_file(c.reward / "head.safetensors")["bias"])
    model = AutoModelForSequenceClassification.from_pretrained(c.reward, num_labels=1).eval()
    exported = AutoModelForSequenceClassification.from_pretrained(c.folder / "exported_reward").eval()
    ids = torch.tensor([[1, 5, 9, 30, 2]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, exported(ids).logits, atol=1e-5)
    assert exported.config.score_bias == pytest.approx(bias)
