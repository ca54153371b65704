"""What the subcommands do after parsing: load, call the library once, print a table or JSON."""
