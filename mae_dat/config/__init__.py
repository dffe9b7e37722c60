"""The flags and YAML settings of trainings, the parsing of all flags, and the errors that reach users; free of torch.

A command with flags of its own declares them beside its `main`.
"""
