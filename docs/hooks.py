"""What the site does beyond MkDocs: pages that are READMEs, and formulas without a script from elsewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Pages of the site that are files of the repository, and where their links lead within the site.
READMES = {"index.md": "README.md", "loss.md": "kernels/README.md", "contributing.md": "CONTRIBUTING.md"}
LINKS = {
    "](docs/": "](",
    "](kernels/README.md)": "](loss.md)",
    "](CONTRIBUTING.md)": "](contributing.md)",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the READMEs as pages."""
    for page, source in READMES.items():
        text = (ROOT / source).read_text()
        for repository, site in LINKS.items():
            text = text.replace(repository, site)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(content: str, **_: Any) -> str:
    r"""Turn the formulas of a page, \(…\) and \[…\], into MathML, which browsers draw by themselves."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"),
        content,
    )
