"""Images packed into few large files: writing, indexing, caching and reading them."""
