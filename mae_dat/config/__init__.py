"""The flags and YAML settings of all commands, their command line, and the errors that reach users; free of torch."""
