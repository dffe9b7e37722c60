"""Train visual tokenizers, from scratch or by distillation."""
