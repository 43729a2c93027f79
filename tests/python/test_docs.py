"""The documents: docs/api.md is what the docstrings say, examples run, links lead somewhere, lines are short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import gemma_norm

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = [ROOT / "setup.py", *ROOT.glob("python/gemma_norm/*.py"), *ROOT.glob("python/gemma_norm/_ops/*.py")]
LONGEST_LINE = 120


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def outside_of_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_api_page_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_api.py"))["page"]()
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == made, "run make docs"
    for name in gemma_norm.__all__:
        assert f"gemma_norm.{name}" in made


def test_the_examples_run_in_the_order_in_which_they_are_read() -> None:
    """The README's are one program, which those of docs/usage.md continue."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    examples = [*blocks(ROOT / "README.md", "python"), *blocks(ROOT / "docs/usage.md", "python")]
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, "example", "exec"), names)


def test_the_examples_of_other_pages_run() -> None:
    examples = blocks(ROOT / "docs/training.md", "python")
    assert examples
    for example in examples:
        exec(compile(example, "example", "exec"), {})


def test_messages_that_are_explained_are_messages() -> None:
    """The headings of docs/troubleshooting.md are pieces of messages, letter for letter."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    joined = re.sub(r'"\s*\n\s*f?"', "", text)  # a string that goes on in the next line
    for names in ("{call.x_name}", "{x_name}"):
        joined = joined.replace(names, "x")
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(headings) > 25
    unknown = [heading for heading in headings if heading not in joined]
    assert not unknown, f"no message has {unknown}"


def test_every_page_is_in_the_site() -> None:
    """A page that no list of docs/index.md names could not be found there."""
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = {name for lines in re.findall(r"```{toctree}\n(.*?)```", index, re.S) for name in lines.split()}
    pages = {page.stem if page.parent.name == "docs" else f"../{page.stem}" for page in PAGES} - {"index"}
    assert pages <= listed, f"not in docs/index.md: {pages - listed}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        return made | set(re.findall(r'<a id="([^"]+)">', text))

    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", outside_of_blocks(page)):
        file = page.parent / target if target else page
        assert file.exists(), f"{page_name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page_name(page)} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Those named with their folder, which are most: a file that moves leaves its old name in documents."""
    for path in re.findall(r"`((?:csrc|docs|python|tests|examples)/[\w./*-]*\w)`", page.read_text(encoding="utf-8")):
        assert any(ROOT.glob(path)) or path.startswith("docs/cpu-"), f"{page_name(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_lines_are_short_but_for_tables(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > LONGEST_LINE and "|" not in line]


def test_rows_of_the_tuning_log_have_ids_of_their_own_and_those_cited_exist() -> None:
    log = (ROOT / "docs/tuning-log.md").read_text(encoding="utf-8")
    ids = re.findall(r'^<a id="t\d+"></a>(T\d+) ', log, re.M)
    assert len(ids) > 60 and len(set(ids)) == len(ids)
    code = [file.read_text(encoding="utf-8") for file in ROOT.glob("csrc/*/*.*")]
    comments = [comment for text in code for comment in re.findall("//.*", text)]
    cited = {found for text in [log, *comments] for found in re.findall(r"\bT[1-9]\d*\b", text)}
    assert cited <= set(ids), f"not in docs/tuning-log.md: {sorted(cited - set(ids))}"


def test_plots_are_pngs_and_belong_to_a_page() -> None:
    """A vector graphic of these is thousands of lines that no reader and no review looks at."""
    plots = {f"plots/{file.name}" for file in (ROOT / "docs/plots").iterdir()}
    shown = {plot for page in PAGES for plot in re.findall(r"plots/[\w-]+\.\w+", page.read_text(encoding="utf-8"))}
    assert plots == shown and all(plot.endswith(".png") for plot in plots)
