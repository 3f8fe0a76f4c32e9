"""What the documentation says is so: its code runs, its outputs have today's shape, the site builds."""

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import blocks
import mdml_kernels
import pytest
from blocks import ROOT, Reader
from mdml_cli.app import app

import mdml_fast

PAGES = blocks.pages()
IMAGE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    for block, shown, printed in blocks.runs(page, tmp_path):
        if shown:
            assert blocks.agrees(shown.code, printed), (
                f"{page.name}:{block.line} prints something else than the page shows; see that it is right, then "
                f"`python docs/blocks.py {page.relative_to(ROOT)}`\n{printed}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_fence_is_code_that_runs_or_what_it_prints(page: Path) -> None:
    text = page.read_text()
    languages = [block.language for block in blocks.blocks(text)]
    assert len(languages) * 2 == len(re.findall(r"^\s*(?:```|~~~)", text, flags=re.MULTILINE))
    assert set(languages) <= {"python", "bash", "text"}
    for before, language in zip([None, *languages], languages, strict=False):
        assert language != "text" or before in ("python", "bash")


def test_a_wrong_page_is_found(tmp_path: Path) -> None:
    def ran(language: str, code: str) -> str:
        [block] = blocks.blocks(f"```{language}\n{code}\n```\n")
        return Reader("page", tmp_path).run(block)

    assert ran("python", "print(6 * 7)") == "42\n"
    with pytest.raises(ZeroDivisionError):
        ran("python", "1 / 0")
    with pytest.raises(AssertionError, match="exits 2, not 0"):
        ran("bash", "mdml-fast train nothing.csv")
    assert "no such file" in ran("bash", "mdml-fast train nothing.csv --label a --normal b  # exits 2")
    assert ran("bash", "pip install something && echo done | cat") == "done\n"

    assert blocks.agrees("│ a │ 0.9 ± 0.01 │", "│ a   │  0.875 ± 0.125 │")
    assert blocks.agrees("version 1\n…\nend …", "version 22\nx\ny\nend of it")
    assert not blocks.agrees("score, p_value", "score, p_values")
    assert not blocks.agrees("one line", "one line\nand another")


def test_every_command_is_shown() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"\n## {name}\n" in text
        assert f"\nmdml-fast {name} --help\n" in text


def test_every_public_name_is_in_the_api() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}
    assert {*mdml_fast.__all__, *mdml_kernels.__all__} <= named


def test_figures_are_those_that_the_script_makes_and_stand_alone() -> None:
    import figures

    made = {f"{name}.svg" for name in figures.FIGURES}
    shown = {Path(link).name for page in PAGES for link in IMAGE.findall(page.read_text())}
    assert shown == made == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    for name in made:
        text = (ROOT / "docs" / "figures" / name).read_text()
        ET.fromstring(text)
        assert len(text) < 200_000
        assert "prefers-color-scheme: dark" in text
        assert "currentColor" in text
        assert "<script" not in text
        assert not re.search(r"(?:href|src)=\"(?!#)", text)


def test_tables_are_those_of_the_results() -> None:
    import tables

    shown = []
    for page in blocks.pages():
        text = page.read_text()
        assert tables.with_tables(text) == text, f"{page.name}: python docs/tables.py writes its tables anew"
        shown += [found["name"] for found in tables.PLACE.finditer(text)]
    assert sorted(shown) == sorted(tables.TABLES)


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install '.[docs]'")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "site" / "how-it-works" / "index.html").read_text()
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"' in page
    assert "arithmatex" not in page
    for path in (tmp_path / "site").rglob("*.html"):
        # Everything that a browser loads by itself is a file of the site.
        loaded = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?:[^\s\">]+)", path.read_text())
        assert not loaded, (path.name, loaded)


def test_the_example_is_what_the_guide_says(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, ROOT / "docs" / "example.py"], cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"flows.parquet", "new.parquet", "new.csv"}
