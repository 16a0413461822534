"""Whatever stands in a file or a recipe, the answer is rows or one message: never a traceback."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages import inputs, report
from stages.checkpoint.manifest import read_manifest
from stages.checkpoint.run import open_run
from stages.checkpoint.tensors import read_header, save_tensors, tensor_metadata
from stages.config import SftConfig
from stages.data import raw_rows, rows, sources
from stages.errors import CheckpointError, ConfigError, UserError
from stages.knobs import knobs
from stages.measuring_config import STAGES
from stages.models import base_files as source
from stages.models.candidates import parent_of
from stages.models.model_ref import open_model
from stages.recipe import read_recipe, resolve
from stages.results import Silent
from tests.commands import rlhf, write_data

pytestmark = pytest.mark.full

# The same examples on every run and on every machine, so that a failure is the change's and nobody else's.
FUZZ = settings(
    derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
FEW = settings(FUZZ, max_examples=20)


def answers(call: typing.Callable[[], object]) -> object:
    """What a call returns, or the mistake it names; every other exception is a failure.

    A mistake is one line that says what is wrong, with where and what to do.
    """
    try:
        return call()
    except UserError as error:
        assert error.what.strip() and "\n" not in error.what.strip(), error.what
        assert error.where and "\n" not in error.where, error.where
        assert error.fix and error.fix.strip(), str(error)
        assert len(error.what) < 2000, len(error.what)
        return error


# --- what stands in a row

TEXT = st.text(max_size=12) | st.sampled_from(["", " ", "a b", "\0", "\x1b[2J", "\u202e", "\r\n", "NaN", "1e999", "é"])
ATOMS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | TEXT
JSON = st.recursive(ATOMS, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXT, part, max_size=3))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from([*raw_rows.MESSAGE_ROLES, *raw_rows.ROLE_ALIASES, "cat"]) | JSON, "content": TEXT | JSON},
    optional={"tool_calls": JSON, "name": TEXT, "from": TEXT, "value": TEXT},
)
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]) | JSON, "value": TEXT | JSON})
TALK = st.lists(MESSAGE | SHAREGPT, max_size=3) | st.sampled_from(
    [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "tool", "content": ""}, {"role": "assistant", "content": "b"}],
    ]
)
CELL = st.one_of(TEXT, TALK, JSON, st.lists(TEXT, max_size=3), st.lists(st.integers(0, 3), max_size=3))
FORMATS = rows.DEMONSTRATIONS + rows.COMPARISONS + rows.PROMPTS
KEYS = sorted({name for form in FORMATS for name in form.columns} | {"margin", "probability", "annotator", "input"})
ROW = st.one_of(
    *(st.fixed_dictionaries(dict.fromkeys(form.columns, CELL), optional={"margin": CELL}) for form in FORMATS),
    st.dictionaries(st.sampled_from(KEYS) | TEXT, CELL, max_size=4),
    JSON,
)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """The suffix and the bytes of a dataset: rows of a kind, rows with something broken, or anything at all."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    found = draw(st.lists(ROW, min_size=1, max_size=4))
    if suffix == ".jsonl":
        data = "".join(json.dumps(row) + "\n" for row in found).encode()
    elif suffix == ".json":
        data = json.dumps(draw(st.sampled_from([found, {"data": found}, found[0]]))).encode()
    else:
        names = draw(st.lists(st.sampled_from(KEYS) | TEXT, max_size=3))
        text = io.StringIO()
        lines = draw(st.lists(st.lists(TEXT, min_size=len(names), max_size=len(names)), max_size=3))
        csv.writer(text).writerows([names, *lines])
        data = text.getvalue().encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(data)))
        broken = st.binary(max_size=4) | st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b'"', b"\n", b"{", b","])
        data = data[:place] + draw(broken) + data[place + draw(st.integers(0, 4)) :]
    return suffix, data


ANYTHING = st.tuples(st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), st.binary(max_size=60))
READERS = (rows.read_demonstrations, rows.read_prompts, rows.read_comparisons)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@FUZZ
@given(file=files() | ANYTHING, skip=st.booleans(), map=st.none() | st.dictionaries(TEXT, TEXT, max_size=2))
def test_any_dataset_is_rows_or_one_message(place, file, skip, map):
    suffix, data = file
    path = place / f"rows{suffix}"
    path.write_bytes(data)
    for read in READERS:
        found = answers(lambda: read(str(path), map=map, skip_bad_rows=skip))  # noqa: B023
        assert isinstance(found, UserError) or found.rows
        if isinstance(found, UserError):
            assert str(path) in found.where
    answers(lambda: rows.detect_kind(str(path), map=map))
    rated = {"rating_threshold": 0.5, "normalise_raters": True}
    answers(lambda: rows.read_comparisons(str(path), skip_bad_rows=skip, **rated))


@pytest.fixture(scope="module")
def world(place, model_folder):
    """A base with a chat template, and the folder with the data that a command needs beside the fuzzed one."""
    write_data(place, chat=True)
    return model_folder("llama", chat=True), place


@FEW
@given(file=files(), skip=st.booleans())
def test_a_dry_run_on_any_dataset_is_a_plan_or_one_message(world, file, skip):
    base, folder = world
    suffix, data = file
    path = folder / f"dry{suffix}"
    path.write_bytes(data)
    for command in ("sft", "reward", "dpo", "sample"):
        output = folder / ("o.jsonl" if command == "sample" else "o")
        line = [command, "--model", base, "--dataset", path, "--output", output, "--dry-run"]
        ended = rlhf(*line, *(["--skip-bad-rows"] if skip else []))
        assert ended.code in (0, 2), ended.stderr
        assert ended.code == 0 or ended.stderr.count("error: ") >= 1, ended.stderr
        assert "defect" not in ended.stderr and "Traceback" not in ended.stderr and not output.exists()
        assert not set(ended.stdout + ended.stderr) & set("\0\x1b\r\u202e")


# --- recipes

YAML = st.sampled_from(
    ["1", "1.5", "true", "~", "[]", "[1, a]", "{a: b}", "'x'", '"\\0"', '"\\ud800"', "!!python/object:os.system x",
     "!!bool x", "!!int ''", "!!timestamp x", "!!float x", "&a [*a]", "*b", "2020-01-01", "0x_", "1_000", ".nan",
     "-.inf", "!!binary x", "!!set {a}", "!!omap [a]", "!!pairs [a]", "? [a]", "|\n  x", "1e400", "190:20:30", "? {}",
     "9" * 5000, "auto", "none", "<<: 1", "!!str", "!x y", "2020-99-99", "- a"]
)  # fmt: skip
LINES = st.lists(
    st.tuples(st.sampled_from(sorted(knobs(STAGES["ppo"]))) | st.sampled_from(["<<", "? a", "!!bool seed", "1"]), YAML),
    max_size=3,
).map(lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs))


@FUZZ
@given(text=LINES | LINES | st.text(max_size=40), stage=st.sampled_from(sorted(STAGES)))
def test_any_text_as_a_recipe_is_knobs_or_one_message(place, text, stage):
    path = place / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = answers(lambda: read_recipe(path, STAGES[stage]))
    if isinstance(found, dict):
        answers(lambda: resolve(STAGES[stage], found, {"model": "m", "dataset": "d", "output": "o"}))
    else:
        assert isinstance(found, ConfigError) and str(path) in found.where


@FUZZ
@given(data=st.data(), stage=st.sampled_from(sorted(STAGES)))
def test_any_value_of_any_knob_is_taken_or_refused(data, stage):
    """What is taken has the knob's own type, so nothing behind it has to look again."""
    cls = STAGES[stage]
    needed = {"model": "m", "dataset": "d", "output": "o", "reward": ["r.py"]}
    required = {n: (v, f"r.yaml:{i}") for i, (n, v) in enumerate(needed.items(), 1) if n in knobs(cls)}
    value = JSON | st.integers(-3, 300) | st.floats(0, 1) | st.dates()
    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(knobs(cls))), value, max_size=3))
    found = answers(lambda: resolve(cls, required | {n: (v, "r.yaml:9") for n, v in chosen.items()}, {}))
    if isinstance(found, ConfigError):
        return
    assert isinstance(found, cls)
    for name, (_, _, kind) in knobs(cls).items():
        kinds = tuple(typing.get_origin(k) or k for k in typing.get_args(kind) or (kind,))
        kinds = kinds if typing.get_origin(kind) not in (list, dict) else (typing.get_origin(kind),)
        assert isinstance(getattr(found, name), kinds), name


PLACE = TEXT.filter(lambda text: "\n" not in text)
PLACE |= st.sampled_from([".", "/", "~", "a/b", "a/b:c", "x.py:y", "=1", "x=nan"])
NAMED = ("model", "dataset", "output", "reward", "eval_dataset", "against", "ptx_dataset")
GOOD = dict.fromkeys(("sft",), "demonstrations") | dict.fromkeys(("reward", "dpo"), "comparisons")


@FUZZ
@given(places=st.fixed_dictionaries(dict.fromkeys(NAMED, PLACE)), stage=st.sampled_from(sorted(STAGES)))
def test_any_place_is_opened_or_refused(world, places, stage):
    """With each place before it mended in turn, so that the next one is looked at."""
    base, folder = world
    cls = STAGES[stage]

    def away(name, *rest):
        raise CheckpointError("the hub is not asked in this test", where="hub", fix="none")

    places = {name: value for name, value in places.items() if name in knobs(cls)}
    good = {"model": str(base), "dataset": str(folder / f"{GOOD.get(stage, 'prompts')}.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(source, "download", away)
        patch.setattr(sources, "_load_hub", away)
        for name in (None, "model", "dataset", "reward", "against", "eval_dataset", "ptx_dataset"):
            if name in places and name in good:
                places[name] = good[name]
            elif name is not None:
                places.pop(name, None)
            known = {n: (v, "r.yaml:1") for n, v in places.items()}
            answers(lambda: inputs.open_inputs(stage, resolve(cls, known, {})))  # noqa: B023


# --- what this tool wrote itself, and somebody changed


@st.composite
def changed(draw, content: object) -> object:
    """A JSON value with one of its parts, however deep, replaced by anything or left out."""
    if isinstance(content, dict) and content and draw(st.integers(0, 7)):
        key = draw(st.sampled_from(sorted(content)))
        if draw(st.integers(0, 4)) == 0:
            return {name: value for name, value in content.items() if name != key}
        return content | {key: draw(changed(content[key]))}
    if isinstance(content, list) and content and draw(st.booleans()):
        return [draw(changed(content[0])), *content[1:]]
    return draw(JSON)


@pytest.fixture(scope="module")
def checkpoint(chain, place):
    """A copy of a small PPO checkpoint, its files by their names, and what goes by their side."""
    import shutil

    found = chain()
    shutil.copytree(found.folder, place / "chain")
    return dataclasses.replace(found, folder=place / "chain")


def rewritten(path, draw) -> bytes:
    """Change a JSON file; returns what it was."""
    before = path.read_bytes()
    path.write_text(json.dumps(draw(changed(json.loads(before)))))
    return before


@FUZZ
@given(data=st.data())
def test_any_manifest_is_read_or_refused(checkpoint, data):
    path = checkpoint.ppo / "checkpoint.json"
    before = rewritten(path, data.draw)
    try:
        answers(lambda: read_manifest(checkpoint.ppo))
        found = answers(lambda: open_model(str(checkpoint.ppo), stages=("ppo",), what="--model"))
        if not isinstance(found, UserError):
            answers(lambda: parent_of(found))
            prompts = {"dataset": str(checkpoint.prompts), "model": str(checkpoint.ppo)}
            config = STAGES["evaluate"](**prompts)
            answers(lambda: inputs.open_inputs("evaluate", config))
        config = STAGES["ppo"](model="m", dataset="d", output="o", reward=["r"])
        try:
            open_run(checkpoint.ppo, "ppo", config, {})
        except UserError as error:
            assert error.fix
        answers(lambda: report.run([str(checkpoint.folder), str(checkpoint.ppo)], Silent()))
    finally:
        path.write_bytes(before)


@FUZZ
@given(data=st.data())
def test_any_evaluation_is_reported_or_refused(checkpoint, data):
    from rlhf_cli.console import show

    path = checkpoint.folder / "evaluate.json"
    before = rewritten(path, data.draw)
    try:
        found = answers(lambda: report.run([str(checkpoint.folder)], Silent()))
        if not isinstance(found, UserError):
            for as_json in (False, True):
                show(found, as_json, io.StringIO())
    finally:
        path.write_bytes(before)


@FUZZ
@given(data=st.data(), name=st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"]))
def test_any_config_of_a_base_is_read_or_refused(model_folder, place, data, name):
    import shutil

    from stages.models.model_ref import stop_ids_of

    folder = place / "base"
    if not folder.exists():
        shutil.copytree(model_folder("llama"), folder)
    before = rewritten(folder / name, data.draw)
    try:
        found = answers(lambda: open_model(str(folder), stages=(), what="--model"))
        if not isinstance(found, UserError):
            answers(lambda: (found.context, found.digest, found.base_ref, stop_ids_of(found)))
    finally:
        (folder / name).write_bytes(before)


CONFIG = SftConfig(model="m", dataset="d", output="o")


@FUZZ
@given(data=st.data(), honest=st.booleans())
def test_any_state_is_gone_on_from_or_passed_over(place, data, honest):
    """`honest`: the digest inside fits what was changed, as a later version of this tool might write it."""
    import torch

    from stages.checkpoint.states import _digest

    folder = place / "run"
    run = open_run(folder, "sft", CONFIG, {})
    run.start()
    try:
        state = folder / "state" / "step-000001" / "state.json"
        if not state.exists():
            run.save_state(1, {"x": torch.zeros(2)}, {"loss": 1.0})
        stored = json.loads(state.read_text())
        if honest:
            content = data.draw(changed(stored["content"]))
            stored = {"sha256": _digest(json.loads(json.dumps(content))), "content": content}
        else:
            stored = data.draw(changed(stored))
        before = state.read_text()
        state.write_text(json.dumps(stored))
        try:
            found = run.latest_state()
            assert found is None or (type(found.step) is int and isinstance(found.facts, dict))
            assert found is None or all(type(size) is int for size in found.sizes.values())
        finally:
            state.write_text(before)
    finally:
        run.release()


@FUZZ
@given(content=JSON)
def test_any_run_json_is_somebody_elses_folder_or_a_run(place, content):
    folder = place / "other"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError):
        open_run(folder, "sft", CONFIG, {})


# --- tensors

ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "??"]) | JSON,
        "shape": CELL | JSON,
        "data_offsets": st.lists(st.integers(-1, 16), max_size=3) | JSON,
    },
)


@FUZZ
@given(header=st.dictionaries(TEXT | st.just("__metadata__"), ENTRY | JSON, max_size=3) | JSON, rest=st.binary())
def test_any_tensor_file_is_read_or_refused(place, header, rest):
    path = place / "x.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    for read in (read_header, tensor_metadata):
        answers(lambda: read(path))  # noqa: B023


@FUZZ
@given(data=st.data())
def test_a_tensor_file_with_changed_bytes_is_read_or_refused(place, data):
    import torch

    from stages.checkpoint.tensors import load_tensors

    path = place / "y.safetensors"
    save_tensors(path, {"x": torch.arange(4.0), "y": torch.ones(2)}, {"a": "b"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    answers(lambda: load_tensors(path))
