"""The report's page: a template whose every value is escaped."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mdml_fast.report.content import Content
from mdml_fast.report.plots import figures


def render(content: Content, title: str) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # The figures are matplotlib's, which escapes the text in them.
    drawn = {name: Markup(svg) for name, svg in figures(content).items()}
    template = environment.get_template("template.html")
    return template.render(content=content, figures=drawn, title=title, version=version("mdml-fast"))
