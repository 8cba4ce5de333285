"""The `d2zero` command, a module a sub-command."""
