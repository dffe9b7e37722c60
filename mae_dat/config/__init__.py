"""Every flag and YAML setting, their parsing, and the errors that reach users; free of torch."""
