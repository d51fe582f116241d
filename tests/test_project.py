"""What those who contribute, cite or release read agrees with the project: version, commands, links, names."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mgll_encoder
from tests.environments import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("tests/*/*.md")]
)


def words(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_the_version_that_is_installed_cited_and_described_is_the_one_of_the_metadata() -> None:
    version = PROJECT["version"]
    assert mgll_encoder.__version__ == version, "install again: make install"
    assert yaml.safe_load(words(ROOT / "CITATION.cff"))["version"] == version
    newest = re.search(
        r"^## \[(.+?)\] - (?:Unreleased|\d{4}-\d\d-\d\d)$", words(ROOT / "CHANGELOG.md"), re.MULTILINE
    )
    assert newest
    assert newest[1] == version


def test_the_paper_is_cited_as_the_readme_names_it() -> None:
    paper = yaml.safe_load(words(ROOT / "CITATION.cff"))["preferred-citation"]
    readme = " ".join(words(ROOT / "README.md").split())
    number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
    for said in (paper["title"], number, *(author["family-names"] for author in paper["authors"])):
        assert said in readme
    assert PROJECT["urls"]["Paper"].endswith(number)


def test_every_make_target_that_is_named_exists() -> None:
    makefile = words(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    line = r"make (?:[A-Z]+=\S+ )*([a-z-]+)"
    named = {name for page in PAGES for name in re.findall(rf"(?:^    |`){line}", words(page), re.MULTILINE)}
    for workflow in WORKFLOWS:
        named |= set(re.findall(rf"(?:run|command): {line}", words(workflow)))
        named |= set(re.findall(r"target: ([a-z-]+)", words(workflow)))
    assert {"install", "lint", "test", "test-slow", "test-lowest", "check-wheel"} <= named
    assert named <= targets


def test_ci_runs_the_python_versions_that_the_metadata_name() -> None:
    named = {one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)}
    rows = yaml.safe_load(words(ROOT / ".github" / "workflows" / "ci.yml"))["jobs"]["test"]["strategy"][
        "matrix"
    ]
    assert {row["python"] for row in rows["include"] if row["versions"] == "locked"} == named
    lowest = min(named, key=lambda version: int(version.partition(".")[2]))
    assert PROJECT["requires-python"] == f">={lowest}"
    assert {row["python"] for row in rows["include"] if row["versions"] == "lowest"} == {lowest}


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", words(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", words(page)):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_what_the_glossary_says_is_defined_there_is() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in words(ROOT / "docs" / "glossary.md").splitlines()
        if line.startswith("| ")
    ]
    defined = [re.findall(r"`([^`]+)`", row[2]) for row in rows[1:] if len(row) > 2 and "`" in row[2]]
    assert len(defined) > 60
    for path, *names in defined:
        assert (ROOT / path).is_file(), path
        for name in names:
            assert re.search(rf"^ *(?:class|def) {name}\b", words(ROOT / path), re.MULTILINE), (path, name)


def test_the_image_is_made_of_what_is_there() -> None:
    named = re.findall(r"^!(.+)$", words(ROOT / ".dockerignore"), re.MULTILINE)
    assert set(named) >= {
        "pyproject.toml",
        "requirements/lock.txt",
        "mgll_encoder",
        "mllm_adapters",
        "eval_mcq",
    }
    assert [name for name in named if not (ROOT / name).exists()] == []
