"""The command line of mdml-fast."""
