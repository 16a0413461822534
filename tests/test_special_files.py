"""Pipes, sockets, devices, links that lead nowhere or in a circle, folders for files: refused, nothing waits."""

from __future__ import annotations

import itertools
import os
import shutil
import socket

import pytest

from stages.places import describe_special
from stages.reading import read_json, sha256_of
from tests.commands import SHORT, refused
from tests.marks import full_but

KINDS = {
    "pipe": "is a named pipe",
    "socket": "is a socket",
    "device": "is a device",
    "circle": "is a link that leads in a circle",
    "nowhere": "is a link to",
}
pytestmark = pytest.mark.timeout(60)


def make(kind, place):
    """Something of this kind at a place; returns where it stands."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(place.parent)  # the name of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(place.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "circle":
        place.symlink_to(place.name)
    elif kind == "nowhere":
        place.symlink_to("gone")
    return place


PLAIN = ("pipe", "socket", "device", "circle", "nowhere")
WORDS = {k: KINDS[k].removeprefix("is ") for k in PLAIN}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_stands_there_is_said(tmp_path, kind):
    assert describe_special(make(kind, tmp_path / "x")).startswith(WORDS[kind])


def test_files_folders_and_links_to_them_are_nothing_special(tmp_path):
    (tmp_path / "f").write_text("1")
    (tmp_path / "link").symlink_to("f")
    (tmp_path / "folder").symlink_to(tmp_path)
    for name in ("f", "link", "folder", "gone", "gone/x", "f/x", "\0"):
        assert describe_special(tmp_path / name) == ""


# flag, suffix, the command line but for that flag
READ = {
    "dataset": ("--dataset", ".jsonl", lambda c, p: ["sft", "--model", c.base, "--output", p / "out"]),
    "eval dataset": (
        "--eval-dataset", ".jsonl",
        lambda c, p: ["sft", "--model", c.base, "--dataset", c.demonstrations, "--output", p / "out"],
    ),
    "ptx dataset": (
        "--ptx-dataset", ".parquet",
        lambda c, p: [
            "ppo", "--model", c.sft, "--reward", c.reward, "--dataset", c.prompts, "--output", p / "out", *SHORT,
        ],
    ),
    "demonstrations": (
        "--demonstrations", ".csv",
        lambda c, p: ["reward", "--model", c.sft, "--dataset", c.comparisons, "--output", p / "out"],
    ),
    "recipe": (
        "--config", ".yaml",
        lambda c, p: ["sft", "--model", c.base, "--dataset", c.demonstrations, "--output", p / "out"],
    ),
    "template": (
        "--chat-template", ".jinja",
        lambda c, p: ["sft", "--model", c.base, "--dataset", c.demonstrations, "--output", p / "out"],
    ),
    "function": (
        "--reward", ".py", lambda c, p: ["ppo", "--model", c.sft, "--dataset", c.prompts, "--output", p / "out"],
    ),
    "model": ("--model", "", lambda c, p: ["sft", "--dataset", c.demonstrations, "--output", p / "out"]),
    "also": ("--also", "", lambda c, p: ["evaluate", "--model", c.sft, "--dataset", c.prompts, "--reward", c.reward]),
}  # fmt: skip
WRITTEN = {
    "samples": ("--output", ".jsonl", lambda c, p: ["sample", "--model", c.sft, "--dataset", c.prompts, *SHORT]),
    "report": (
        "--output", ".json", lambda c, p: ["evaluate", "--model", c.sft, "--dataset", c.prompts, "--reward", c.reward],
    ),
    "plot": (
        "--plot", ".svg",
        lambda c, p: [
            "evaluate", "--model", c.sft, "--dataset", c.prompts, "--reward", c.reward, "--best-of", 2,
            "--reference", c.base,
        ],
    ),
    "export": ("--output", "", lambda c, p: ["export", "--model", c.sft]),
}  # fmt: skip
FEW = {("dataset", kind) for kind in PLAIN} | {("samples", kind) for kind in PLAIN}
FEW |= {(name, "pipe") for name in (*READ, *WRITTEN)}


@pytest.mark.parametrize(("name", "kind"), full_but(FEW, itertools.product(READ, PLAIN)))
def test_nothing_special_is_read(chain, tmp_path, name, kind):
    flag, suffix, line = READ[name]
    place = make(kind, tmp_path / f"x{suffix}")
    said = refused(*line(chain(), tmp_path), flag, place)
    assert WORDS[kind] in said and str(place) in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "kind"), full_but(FEW, itertools.product(WRITTEN, PLAIN)))
def test_nothing_special_is_written_over(chain, tmp_path, name, kind):
    if kind == "nowhere" and name != "export":
        pytest.skip("a link to a file that is not there yet is written through")
    flag, suffix, line = WRITTEN[name]
    place = make(kind, tmp_path / f"x{suffix}")
    said = refused(*line(chain(), tmp_path), flag, place)
    assert WORDS[kind] in said and str(place) in said


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pipe", "cannot be used as a folder: it is a named pipe"),
        ("device", "cannot be used as a folder: it is a device"),
        ("circle", "cannot be used as a folder: it is a link that leads in a circle"),
        ("nowhere", "cannot be used as a folder: it is a link to gone, which does not exist"),
    ],
)
def test_a_run_needs_a_folder(chain, tmp_path, kind, says):
    place = make(kind, tmp_path / "x")
    line = ("sft", "--model", chain().base, "--dataset", chain().demonstrations, "--output", place)
    assert says in refused(*line)


@pytest.mark.parametrize("name", [n for n in READ if n not in ("model", "also", "dataset")])
def test_a_folder_is_no_file(chain, tmp_path, name):
    flag, suffix, line = READ[name]
    (tmp_path / f"x{suffix}").mkdir()
    said = refused(*line(chain(), tmp_path), flag, tmp_path / f"x{suffix}")
    assert f"x{suffix}" in said


@pytest.mark.parametrize("name", READ)
def test_a_path_through_a_circle_leads_nowhere(chain, tmp_path, name):
    flag, suffix, line = READ[name]
    make("circle", tmp_path / "loop")
    refused(*line(chain(), tmp_path), flag, tmp_path / "loop" / f"x{suffix}")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_a_model_is_named(chain, tmp_path, file):
    shutil.copytree(chain().base, tmp_path / "base")
    (tmp_path / "base" / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "base" / file)
    line = ("sft", "--dataset", chain().demonstrations, "--output", tmp_path / "out")
    assert f"{file} is a named pipe" in refused(*line, "--model", tmp_path / "base")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "checkpoint.json"])
def test_a_pipe_in_a_checkpoint_is_named(chain, tmp_path, file):
    shutil.copytree(chain().sft, tmp_path / "sft")
    (tmp_path / "sft" / file).unlink()
    os.mkfifo(tmp_path / "sft" / file)
    line = ("reward", "--dataset", chain().comparisons, "--output", tmp_path / "out", "--model", tmp_path / "sft")
    assert "pipe" in refused(*line)


@pytest.mark.parametrize("file", ["run.json", "checkpoint.json"])
def test_a_pipe_in_the_output_is_somebody_elses(chain, tmp_path, file):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / file)
    line = ("sft", "--model", chain().base, "--dataset", chain().demonstrations, "--output", tmp_path / "out")
    assert "does not hold an rlhf run" in refused(*line)


def test_what_reads_a_file_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "x")
    for read in (read_json, sha256_of):
        with pytest.raises(OSError, match="it is a named pipe, not a file"):
            read(tmp_path / "x")


@pytest.mark.parametrize("text", ["[" * 101 + "]" * 101, "[" * 100_000 + "]" * 100_000, '{"a": NaN}', "[Infinity]"])
def test_json_that_this_tool_would_not_write_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match="nested too deeply|is no number"):
        read_json(tmp_path / "x")
