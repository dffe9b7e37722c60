"""Networks on pixels in [0, 1]: autoencoders, classifiers, detectors, visual tokenizers, and their weights."""
