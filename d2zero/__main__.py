"""`python -m d2zero`."""

from d2zero.cli.main import main

main()
