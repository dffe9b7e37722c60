"""From image files to batches: image sets, decoding, transforms, samplers and loaders."""
