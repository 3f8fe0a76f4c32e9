"""`python -m mdml_cli` is `mdml-fast`."""

from mdml_cli.app import main

main()
