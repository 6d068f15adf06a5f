"""The commands of `longspan`, one file each; `cli.py` puts them together."""
