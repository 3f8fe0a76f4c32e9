"""`mdml-fast doctor`."""

from __future__ import annotations

import typer

from mdml_cli import output
from mdml_cli.options import JsonOption


def doctor(json: JsonOption = False) -> None:
    """Say what this machine offers, and check that the engine computes right here; exits 1 where it does not."""
    from mdml_fast.diagnosis import diagnose

    document = diagnose()
    if json:
        output.print_json(document)
    else:
        for name, value in document["environment"].items():
            typer.echo(f"{name:>14}  {'not installed' if value is None else value}")
        for where, backend in document["backends"].items():
            typer.echo(f"{'loss':>14}  on {where}: backend {backend}")
        for check in document["checks"]:
            typer.echo(f"{'ok' if check['ok'] else 'WRONG':>14}  {check['what']}: relative error {check['error']:.1e}")
    if not document["ok"]:
        raise typer.Exit(1)
