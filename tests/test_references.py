"""Files and headings that help, messages, comments, recipes and documents name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from stages.knobs import knobs
from stages.measuring_config import STAGES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("stages", "rlhf_cli", "recipes", "benchmarks", "tests")
SOURCES = sorted(
    file
    for top in FOLDERS
    for pattern in ("*.py", "*.yaml")
    for file in (ROOT / top).rglob(pattern)
    if file != Path(__file__).resolve()
)
PAGES = [ROOT / "README.md", *sorted(file for top in FOLDERS[:-1] for file in (ROOT / top).rglob("*.md"))]
NAMED = re.compile(rf"(?<![\w./])(?:(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|md|yaml|json)|README(?:\.md)?)\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=label)
def test_the_files_that_a_source_names_exist(file):
    """Whole paths in texts and comments. A README is not installed, and there are three."""
    text = file.read_text(encoding="utf-8").replace('"README.md"', "")
    for name in NAMED.findall(text):
        assert not name.startswith("README"), name
        assert (ROOT / name).exists(), name


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_the_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        place, _, heading = link.partition("#")
        if "://" in place:
            continue
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link
    for name in NAMED.findall(text):
        assert name.startswith("README") or "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_the_knobs_and_commands_that_a_page_names_exist(page):
    """Every --flag after `rlhf COMMAND`, up to the end of its line or code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for command, words in re.findall(r"\brlhf (sft|reward|ppo|dpo|evaluate|sample|export) ([^`\n#]*)", text):
        flags = set(re.findall(r"--([a-z][a-z-]*)", words)) - {"config", "dry-run", "overwrite", "json", "debug"}
        flags -= {"help", "help-all"}
        known = {name.replace("_", "-") for name in knobs(STAGES[command])}
        assert not flags - known, (command, flags - known)


def test_no_help_sends_the_reader_to_a_page():
    """Help is installed without the pages."""
    for stage, cls in STAGES.items():
        for name, (_, about, _) in knobs(cls).items():
            assert ".md" not in about.help and "README" not in about.help, (stage, name)


def test_modules_that_docstrings_name_by_their_folder_exist():
    """`rollout/clipped.py` and the like, as seen from stages/ or from the root."""
    for file in (ROOT / "stages").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for name in re.findall(r"(?<![\w./])[a-z_]+/[a-z_]+\.py\b", ast.get_docstring(node) or ""):
                    assert any((top / name).exists() for top in (ROOT, ROOT / "stages")), f"{label(file)}: {name}"
