"""From a name, file or folder to a model, and back: formats, loading, opening, conversion, torch.hub."""
