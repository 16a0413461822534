"""What is read cannot run, escape its folder or steer the terminal; secrets of the environment are written nowhere."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
from rich.cells import cell_len

from rlhf_cli.console import show
from stages.checkpoint.tensors import read_header
from stages.data.sources import read_raw_dataset
from stages.errors import CheckpointError, DatasetError
from stages.models.tokens import Text
from stages.results import Result, Table
from tests.commands import SHORT, Chain, contents, demonstrations, done, lines_of, manifest, refused, rlhf
from tests.marks import full, full_but
from tests.tiny import write_jsonl

STEP = ("--max-steps", 1, "--batch-size", 4, "--limit-rows", 12, "--samples", 1, "--lora-rank", 4)


def sft(found: Chain, output: Path, *more: object, model: object = None, dataset: object = None) -> list:
    named = ["--model", model or found.base, "--dataset", dataset or found.demonstrations, "--output", output]
    return ["sft", *named, *STEP, *more]


def copied(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place


def relisted(folder: Path) -> Path:
    """Write what a checkpoint's files are now into its manifest, as somebody who wants to be believed would."""
    stored = manifest(folder)
    stored["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in stored["files"]}
    (folder / "checkpoint.json").write_text(json.dumps(stored))
    return folder


# --- pickles ------------------------------------------------------------------------------------------------------

PICKLES = (
    "pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt",
    "adapter_model.bin", "tokenizer.pkl", "state.pt", "head.pt", "vocab.pkl", "random_states_0.pkl", "data.pkl",
)  # fmt: skip


class Bomb:
    """An object that, unpickled, makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def bomb(marker):
    """The bytes of a pickle that makes the file `marker` when it is loaded."""
    return pickle.dumps(Bomb(marker))


def plant(folder: Path, bomb: bytes) -> Path:
    for name in PICKLES:
        (folder / name).write_bytes(bomb)
    return folder


def test_the_bomb_goes_off_where_a_pickle_is_loaded(bomb, marker):
    pickle.loads(bomb).close()
    assert marker.exists()


def test_pickles_in_a_base_are_never_loaded(chain, tmp_path, bomb, marker):
    found = chain()
    base = plant(copied(found.base, tmp_path / "base"), bomb)
    done(*sft(found, tmp_path / "out", model=base))
    (base / "model.safetensors").unlink()
    assert "pickled weights" in refused(*sft(found, tmp_path / "out2", model=base))
    assert not marker.exists()


def test_pickles_in_a_checkpoint_are_never_loaded(chain, tmp_path, bomb, marker):
    found = chain()
    policy, reward = (plant(copied(f, tmp_path / f.name), bomb) for f in (found.ppo, found.reward))
    plant(policy / "critic", bomb)
    line = ("ppo", "--model", policy, "--reward", reward, "--dataset", found.prompts, "--output", tmp_path / "out")
    done(*line, *STEP, *SHORT)
    (policy / "adapter_model.safetensors").unlink()
    assert "`adapter_model.safetensors` is missing" in refused(*line, *STEP, *SHORT, "--seed", 1)
    assert not marker.exists()


def test_pickles_in_place_of_tensors_are_damaged_files(chain, tmp_path, bomb, marker):
    found = chain()
    folder = copied(found.sft, tmp_path / "sft")
    (folder / "adapter_model.safetensors").write_bytes(bomb)
    relisted(folder)
    line = ("sample", "--model", folder, "--dataset", found.prompts, "--output", tmp_path / "x.jsonl", *SHORT)
    assert "damaged or incomplete" in refused(*line)
    base = copied(found.base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(bomb)
    assert "damaged or incomplete" in refused(*sft(found, tmp_path / "out", model=base))
    assert not marker.exists()


@pytest.mark.full
def test_pickles_in_a_resume_state_are_never_loaded(chain, tmp_path, bomb, marker):
    found, out = chain(), tmp_path / "out"
    line = sft(found, out, "--keep-state", "--save-every", 1)
    done(*line)
    expected = contents(out)["adapter_model.safetensors"]
    unfinish(out)
    (state,) = (out / "state").iterdir()
    plant(state, bomb)
    (state / "state.safetensors").write_bytes(bomb)
    ended = done(*line)
    assert "is damaged and was skipped" in ended.stderr
    assert contents(out)["adapter_model.safetensors"] == expected and not marker.exists()


def unfinish(out: Path) -> None:
    """Make a finished run one that was killed before its end."""
    stored = manifest(out)
    (out / "checkpoint.json").unlink()
    states = [json.loads(path.read_text()) for path in out.glob("state/*/state.json")]
    owner = states[0]["content"]["run"] if states else "x"
    run = {"format_version": 1, "id": owner, **{key: stored[key] for key in ("stage", "config", "inputs")}}
    (out / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".pickle", ".npy", ".jsonl", ".json", ".csv", ".parquet"])
def test_pickles_as_datasets_are_refused(tmp_path, bomb, marker, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(bomb)
    with pytest.raises(DatasetError):
        read_raw_dataset(str(path))
    assert not marker.exists()


def test_a_dataset_folder_runs_nothing(tmp_path, bomb, marker):
    """Neither a loading script nor a pickle in a saved dataset's files, nor a pickled type in a parquet file."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(DatasetError, match="no dataset files"):
        read_raw_dataset(str(folder))
    saved = tmp_path / "saved"
    saved.mkdir()
    files = {"state.json": {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "x"}, "dataset_info.json": {}}
    for name, content in files.items():
        (saved / name).write_text(json.dumps(content))
    plant(saved, bomb)
    (saved / "data.arrow").write_bytes(bomb)
    with pytest.raises(DatasetError, match="not a readable saved dataset"):
        read_raw_dataset(str(saved))
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    column = pyarrow.field("text", pyarrow.string(), metadata=kind)
    parquet.write_table(pyarrow.table([["a"]], schema=pyarrow.schema([column])), tmp_path / "x.parquet")
    assert read_raw_dataset(str(tmp_path / "x.parquet")).rows[0].values == {"text": "a"}
    assert not marker.exists()


# --- code that ships with a model ---------------------------------------------------------------------------------

EVIL = """
open({marker!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""


def amend(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture
def brings_code(chain, tmp_path, marker, monkeypatch):
    """A base that ships Python code, named in `config.json` or `tokenizer_config.json`."""
    import transformers.dynamic_module_utils

    # Where transformers puts code that it was allowed to run.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def build(name: str) -> Path:
        folder = copied(chain().base, tmp_path / "base")
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        amend(folder / name, auto_map=classes if name == "config.json" else {"AutoTokenizer": [None, "evil.Tokenizer"]})
        return folder

    return build


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_runs_only_where_it_is_trusted(chain, tmp_path, brings_code, marker, name):
    found, base = chain(), brings_code(name)
    line = sft(found, tmp_path / "out", model=base)
    said = refused(*line)
    assert f"auto_map in {name}" in said and "--trust-remote-code" in said
    assert not marker.exists() and not (tmp_path / "out").exists()
    rlhf(*line, "--trust-remote-code")
    assert marker.exists()


def test_a_checkpoints_tokenizer_cannot_bring_code_either(chain, tmp_path, marker):
    folder = copied(chain().sft, tmp_path / "sft")
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    amend(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    relisted(folder)
    line = ("sample", "--model", folder, "--dataset", chain().prompts, "--output", tmp_path / "x.jsonl")
    assert "auto_map in tokenizer_config.json" in refused(*line, *SHORT)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_kernel_from_the_hub_is_code_too(chain, tmp_path, key):
    base = copied(chain().base, tmp_path / "base")
    amend(base / "config.json", **{key: "somebody/kernel"})
    assert "somebody/kernel" in refused(*sft(chain(), tmp_path / "out", model=base))


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mknod('MARKER') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ lipsum.__globals__['os'].mknod('MARKER') }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}",
    ],
)
def test_a_chat_template_cannot_reach_the_system(chain, tmp_path, marker, template):
    found = chain()
    (tmp_path / "t.jinja").write_text(template.replace("MARKER", str(marker)))
    rows = [{"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]}] * 3
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    said = refused(*sft(found, tmp_path / "out", "--chat-template", tmp_path / "t.jinja", dataset=data))
    assert "template" in said and not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mknod [MARKER]",
        "!!python/object/new:os.mknod [MARKER]",
        "!!python/name:os.mknod",
        "!!python/module:os",
        "!custom x",
    ],
)
def test_a_yaml_tag_is_refused_with_its_line(chain, tmp_path, marker, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"epochs: 1\nseed: {value.replace('MARKER', str(marker))}\n")
    said = refused(*sft(chain(), tmp_path / "out", "--config", recipe))
    assert f"{recipe}:2: not valid YAML" in said and not marker.exists()


# --- folders: nothing outside is written, removed or read as ours --------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    """A folder outside the output, with a file of somebody else's."""
    folder = tmp_path / "victim"
    (folder / "step-000001").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / ".rlhf-tmp-0123abcd-x").write_text("theirs")
    (folder / "step-000001" / "state.json").write_text("theirs")
    return folder


@pytest.mark.parametrize(
    "name", ["../victim/precious.txt", *full("/VICTIM/precious.txt", "critic/../../victim/precious.txt")]
)
def test_a_manifest_cannot_name_files_outside_its_folder(chain, tmp_path, victim, name):
    """Neither reading nor repeating nor overwriting such a checkpoint touches what it names."""
    found, out = chain(), copied(chain().sft, tmp_path / "out")
    name = name.replace("/VICTIM", str(victim))
    stored, before = manifest(out), contents(victim)
    stored["files"][name] = hashlib.sha256(b"precious").hexdigest()
    (out / "checkpoint.json").write_text(json.dumps(stored))
    sampled = ("sample", "--model", out, "--dataset", found.prompts, "--output", tmp_path / "x.jsonl")
    again = ("sft", "--config", out / "config.yaml", "--output", out)
    for line in (sampled, again):
        assert "is not a plain file name inside the checkpoint" in refused(*line)
    done(*sft(found, out, "--overwrite"))
    assert contents(victim) == before and name not in manifest(out)["files"]


@pytest.mark.parametrize("name", ["../victim/model.safetensors", "/VICTIM/model.safetensors", "x/../../victim/m", ""])
def test_an_index_of_weights_cannot_name_files_outside_its_folder(chain, tmp_path, victim, name):
    found, base = chain(), copied(chain().base, tmp_path / "base")
    (base / "model.safetensors").rename(victim / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": name.replace("/VICTIM", str(victim))}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json: not an index of weights" in refused(*sft(found, tmp_path / "out", model=base))


@pytest.mark.full
def test_a_manifest_that_names_places_elsewhere_moves_nothing_there(chain, tmp_path, victim):
    """Parents and base are real paths, so they are looked at; overwriting their child leaves them alone."""
    found, out = chain(), copied(chain().ppo, tmp_path / "out")
    stored, before = manifest(out), contents(victim)
    for ref in (stored["base"], *stored["parents"]):
        ref.update(path=str(victim), relative="../victim")
    (out / "checkpoint.json").write_text(json.dumps(stored))
    line = ("sample", "--model", out, "--dataset", found.prompts, "--output", tmp_path / "x.jsonl", *SHORT)
    assert "--model" in refused(*line)
    done(*sft(found, out, "--overwrite"))
    assert contents(victim) == before


LINKS = (
    "metrics.jsonl", "samples.jsonl", "config.yaml", "run.json", "run.lock", "checkpoint.json", "tokenizer.json",
    "adapter_model.safetensors", "state", "critic", ".rlhf-tmp-0123abcd-x", ".rlhf-old-0123abcd-state",
    "state/step-000001", "state/step-000001/state.json", "critic/head.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("how", ["resumed", *full("overwritten")])
@pytest.mark.parametrize("name", full_but(LINKS[::3], LINKS))
def test_nothing_is_written_or_removed_through_a_link_in_an_output_folder(chain, tmp_path, victim, name, how):
    found, out = chain(), copied(chain().ppo, tmp_path / "out")
    before, place = contents(victim), out / name
    if how == "resumed":
        unfinish(out)
    record = {n: (out / n).read_bytes() for n in ("checkpoint.json", "run.json") if (out / n).exists()}
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    target = victim if name in ("state", "critic", "state/step-000001") else victim / "precious.txt"
    if name in record:  # the link shows what was there, or the folder would be somebody else's
        target = victim / name
        target.write_bytes(record[name])
        before = contents(victim)
    place.symlink_to(target)
    line = ["ppo", "--config", out / "config.yaml", "--output", out]
    line = [*line, "--seed", 7, "--overwrite"] if how == "overwritten" else line
    if name == "config.yaml":
        place.unlink()
        shutil.copy(found.ppo / "config.yaml", tmp_path / "recipe.yaml")
        place.symlink_to(target)
        line[2] = tmp_path / "recipe.yaml"
    said = refused(*line)
    assert f"`{name}` is a link to" in said and "remove the link" in said
    assert contents(victim) == before and place.is_symlink()


def test_a_lock_that_is_a_link_in_an_empty_folder_is_refused(chain, tmp_path, victim):
    before = contents(victim)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock").symlink_to(victim / "precious.txt")
    assert "`run.lock` is a link to" in refused(*sft(chain(), tmp_path / "out"))
    assert contents(victim) == before


@pytest.mark.full
@pytest.mark.parametrize("lock", [False, True])
def test_tidying_a_finished_folder_follows_no_link(chain, tmp_path, victim, lock):
    out = copied(chain().sft, tmp_path / "out")
    before = contents(victim)
    for name in ("state", "run.json", "critic", *(["run.lock"] if lock else [])):
        (out / name).symlink_to(victim / "precious.txt" if name.startswith("run") else victim)
    assert "already done" in done("sft", "--config", out / "config.yaml", "--output", out).stdout
    assert contents(victim) == before
    assert lock or not any((out / name).is_symlink() for name in ("state", "run.json"))  # the links themselves went


def test_an_output_folder_may_itself_be_a_link(chain, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    done(*sft(chain(), tmp_path / "out"))
    assert (tmp_path / "disk" / "checkpoint.json").is_file() and (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "checkpoint.json"])
def test_a_checkpoint_does_not_read_through_a_link_out_of_its_folder(chain, tmp_path, name):
    found, folder = chain(), copied(chain().sft, tmp_path / "sft")
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    line = ("sample", "--model", folder, "--dataset", found.prompts, "--output", tmp_path / "x.jsonl", *SHORT)
    assert f"`{name}` leads outside the checkpoint" in refused(*line)


@pytest.mark.full
def test_a_base_may_be_made_of_links_as_a_hub_cache_is(chain, tmp_path):
    found, base = chain(), tmp_path / "snapshot"
    base.mkdir()
    for file in copied(found.base, tmp_path / "blobs").iterdir():
        (base / file.name).symlink_to(file)
    done(*sft(found, tmp_path / "out", model=base))


# --- the terminal -------------------------------------------------------------------------------------------------

# A title, a cleared screen, colours in 7 and 8 bits, a line written over, a bell, bidirectional overrides, markup.
NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\rover\u202egnp.\u2066x\u061c[bold red]b[/] [link=file:///etc]l[/link] :boom: é"
STEERING = set("\x1b\x07\x9b\r\x00\u202e\u2066\u061c")
KEPT = "[bold red]b[/] [link=file:///etc]l[/link] :boom: é"  # what must be shown as it stands


def assert_plain(*streams: str) -> None:
    for text in streams:
        assert not set(text) & STEERING, [c for c in text if c in STEERING]


@pytest.fixture
def nasty_model(monkeypatch):
    """Whatever a model says is nasty."""
    monkeypatch.setattr(Text, "response_text", lambda *arguments: NASTY)


@pytest.mark.full
def test_nasty_prompts_and_responses_are_shown_plainly_and_stored_whole(chain, tmp_path, nasty_model):
    found = chain()
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"red {NASTY}", NASTY: NASTY}] * 2)
    out = tmp_path / "x.jsonl"
    ended = done("sample", "--model", found.ppo, "--dataset", data, "--output", out, *SHORT)
    assert_plain(ended.stdout, ended.stderr)
    assert "[bold red]b[/]" in ended.stdout and ":boom:" in ended.stdout
    assert lines_of(out)[0]["response"] == NASTY and lines_of(out)[0][NASTY] == NASTY
    compare = ("evaluate", "--model", found.ppo, "--against", found.sft, "--reward", found.reward, "--dataset", data)
    report = tmp_path / "run" / "evaluate.json"
    ended = done(*compare, *SHORT, "--output", report)
    assert_plain(ended.stdout, ended.stderr)
    for line in (("report", report.parent), (*compare, *SHORT)):
        ended = done(*line)
        assert_plain(ended.stdout, ended.stderr)
        as_json = done(*line, "--json").stdout
        assert as_json.isascii() and json.loads(as_json) and json.dumps(NASTY)[1:-1] in as_json


def test_nasty_samples_while_training_are_shown_plainly(chain, tmp_path, nasty_model):
    found = chain()
    rows = [row | {"prompt": row["prompt"] + NASTY[:20]} for row in demonstrations()[:12]]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    ended = done(*sft(found, tmp_path / "out", "--eval-fraction", 0.3, dataset=data))
    assert_plain(ended.stdout, ended.stderr)
    assert lines_of(tmp_path / "out" / "samples.jsonl")[0]["response"] == NASTY


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_of_nasty_cells_stays_whole(terminal, monkeypatch):
    import io

    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Screen()
    table = Table(NASTY, ("a", NASTY), ((NASTY, "1"), ("x", "2")))
    show(Result("sft", "done", NASTY, {}, (table,), (NASTY,)), False, stream)
    shown = stream.getvalue()
    unstyled = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # rich's own bold and dim
    assert_plain(unstyled)
    assert (unstyled != shown) is terminal and unstyled.count(KEPT) >= 3
    if terminal:  # a frame whose lines are all equally wide, as the terminal counts
        framed = [line for line in unstyled.splitlines() if line[:1] in set("╭│├╰")]
        assert len(framed) == 7 and {cell_len(line) for line in framed} == {cell_len(framed[0])}
    else:
        assert [line.split()[-1] for line in unstyled.splitlines() if line[:1] in set("x")] == ["2"]


NASTY_NAME = NASTY.replace("/", "|")


def nasty_lines(found: Chain, p: Path) -> dict[str, list]:
    data = write_jsonl(p / f"{NASTY_NAME}.jsonl", [{"prompt": "a", "completion": " "}])
    recipe = p / "recipe.yaml"
    recipe.write_text(json.dumps({NASTY: 1}))
    (p / "value.yaml").write_text(json.dumps({"mask": NASTY, "seed": 1}))

    def rows(row: dict) -> Path:
        place = p / f"{hashlib.sha256(json.dumps(row).encode()).hexdigest()}.jsonl"
        return write_jsonl(place, [row])

    stage = copied(found.sft, p / "stage")
    amend(stage / "checkpoint.json", stage=NASTY)
    based = copied(found.sft, p / "based")
    stored = manifest(based)
    stored["base"] |= {"path": f"/{NASTY}", "relative": NASTY}
    (based / "checkpoint.json").write_text(json.dumps(stored))
    odd = copied(found.base, p / "odd")
    amend(odd / "config.json", model_type=NASTY)
    (p / "f.py").write_text(f"def score(prompts, responses):\n    raise ValueError({NASTY!r})\n")
    out = p / "out"
    rewarded = ["ppo", "--model", found.sft, "--dataset", found.prompts, "--output", out, *SHORT, "--reward"]
    return {
        "file name": sft(found, out, dataset=data),
        "missing file": sft(found, out, dataset=p / NASTY_NAME),
        "model": sft(found, out, model=p / NASTY_NAME),
        "output": sft(found, found.prompts / NASTY_NAME),
        "knob value": sft(found, out, "--mask", NASTY),
        "number": sft(found, out, "--seed", NASTY),
        "device": sft(found, out, "--device", NASTY),
        "template": sft(found, out, "--chat-template", NASTY_NAME),
        "lora target": sft(found, out, "--lora-targets", NASTY),
        "flag": sft(found, out, f"--{NASTY}", 1),
        "command": [NASTY],
        "extra argument": sft(found, out, NASTY),
        "recipe key": sft(found, out, "--config", recipe),
        "recipe value": sft(found, out, "--config", p / "value.yaml"),
        "column": sft(found, out, dataset=rows({NASTY: 1})),
        "map": sft(found, out, "--map", f"prompt={NASTY}", dataset=found.demonstrations),
        "role": sft(found, out, dataset=rows({"messages": [{"role": NASTY, "content": "x"}]})),
        "cell": sft(found, out, dataset=rows({"prompt": {"a": NASTY}, "completion": NASTY})),
        "number in a cell": ["reward", "--model", found.base, "--output", out, "--dataset",
                             rows({"prompt": "a", "chosen": "b", "rejected": "c", "margin": NASTY})],
        "stage": sft(found, out, model=stage),
        "base": sft(found, out, model=based),
        "architecture": sft(found, out, model=odd),
        "reward function": [*rewarded, p / "f.py"],
        "missing reward function": [*rewarded, f"{p / 'f.py'}:{NASTY}"],
        "report": ["report", p / NASTY_NAME],
    }  # fmt: skip


@pytest.mark.parametrize("debug", [False, *full(True)])
def test_nasty_texts_in_messages_are_made_plain(chain, tmp_path, debug, monkeypatch):
    found = chain()
    if debug:
        monkeypatch.setenv("RLHF_DEBUG", "1")
    for name, line in nasty_lines(found, tmp_path).items():
        ended = rlhf(*line)
        assert ended.code == 2 and ended.stdout == "", (name, ended)
        assert_plain(ended.stderr)
        assert ended.stderr.count("error: ") >= 1 and "defect" not in ended.stderr, (name, ended.stderr)
    assert not (tmp_path / "out").exists()


def test_a_defect_is_told_plainly(chain, tmp_path, monkeypatch):
    from stages import inputs

    def fail(*arguments, **more):
        raise RuntimeError(NASTY)

    monkeypatch.setattr(inputs, "open_inputs", fail)
    for more in ((), ("--debug",)):
        ended = rlhf(*sft(chain(), tmp_path / "out", *more))
        assert ended.code == 1 and KEPT in ended.stderr
        assert_plain(ended.stdout, ended.stderr)


# --- tensor files -------------------------------------------------------------------------------------------------


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


OVERSIZED = {
    "a header of 2^60 bytes": tensor_file({}, length=2**60),
    "a header of 2^64 - 1 bytes": tensor_file({}, length=2**64 - 1),
    "a header longer than the file": tensor_file({"x": entry(0, 4, [1])}, b"1234", length=200),
    "a tensor of 2^60 numbers": tensor_file({"x": entry(0, 2**62, [2**60])}, b"1234"),
    "tensors that overlap": tensor_file({"x": entry(0, 8, [2]), "y": entry(4, 12, [2])}, b"123456781234"),
    "a tensor inside another": tensor_file({"x": entry(0, 12, [3]), "y": entry(0, 4, [1])}, b"123456781234"),
    "a hole between tensors": tensor_file({"x": entry(0, 4, [1]), "y": entry(8, 12, [1])}, b"123456781234"),
    "a shape that does not fit": tensor_file({"x": entry(0, 4, [2**40])}, b"1234"),
    "a header nested too deeply": tensor_file(0, length=100_000)[:8] + b"[" * 100_000,
}


@pytest.mark.parametrize("name", full_but(list(OVERSIZED)[::2], OVERSIZED))
def test_an_oversized_header_is_one_message_at_once(chain, tmp_path, name):
    path, content = tmp_path / "x.safetensors", OVERSIZED[name]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    found, base = chain(), copied(chain().base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(content)
    assert "model.safetensors: damaged or incomplete" in refused(*sft(found, tmp_path / "out", model=base))
    folder = copied(found.sft, tmp_path / "sft")
    (folder / "adapter_model.safetensors").write_bytes(content)
    relisted(folder)
    line = ("sample", "--model", folder, "--dataset", found.prompts, "--output", tmp_path / "x.jsonl", *SHORT)
    assert "adapter_model.safetensors: damaged or incomplete" in refused(*line)


# --- secrets ------------------------------------------------------------------------------------------------------

SECRETS = {
    name: f"marker-of-{name.lower()}-5f3a"
    for name in (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "OPENAI_API_KEY",
        "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "MY_PASSWORD",
    )
}  # fmt: skip


@pytest.mark.full
def test_secrets_of_the_environment_are_written_nowhere(chain, tmp_path, monkeypatch):
    found = chain()
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [1 / 0 for r in responses]\n")
    rewarded = ("--reward", tmp_path / "f.py", "--output", tmp_path / "no", *STEP, *SHORT)
    lines = [
        sft(found, tmp_path / "out", "--keep-state", "--save-every", 1),
        ["ppo", "--model", found.sft, "--reward", found.reward, "--dataset", found.prompts, "--output",
         tmp_path / "ppo", *STEP, *SHORT],
        ["evaluate", "--model", found.ppo, "--reward", found.reward, "--dataset", found.prompts, "--limit-rows", 4,
         "--output", tmp_path / "evaluate.json", *SHORT],
        ["report", tmp_path, "--json"],
        ["export", "--model", found.sft, "--output", tmp_path / "exported"],
        sft(found, tmp_path / "no", model="org/name"),
        sft(found, tmp_path / "no", dataset="org/name"),
        ["ppo", "--model", found.sft, "--dataset", found.prompts, *rewarded, "--debug"],
    ]  # fmt: skip
    streams = [rlhf(*line) for line in lines]
    assert [ended.code for ended in streams] == [0, 0, 0, 0, 0, 2, 2, 2]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    told = [text.encode() for ended in streams for text in (ended.stdout, ended.stderr)]
    for secret in SECRETS.values():
        assert not any(secret.encode() in content for content in written + told)


def test_a_running_process_tells_only_who_it_is(tmp_path):
    """run.lock, which others read while a run lasts."""
    from stages.checkpoint.lock import take_lock

    held = take_lock(tmp_path / "run.lock")
    try:
        assert set(json.loads((tmp_path / "run.lock").read_text())) == {"pid", "host", "started"}
    finally:
        held.release()
