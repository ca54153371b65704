"""`python -m pbsp` is the `pbsp` command."""

from pbsp.cli import main

main()
