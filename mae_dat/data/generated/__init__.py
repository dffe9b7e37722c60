"""Images that are drawn instead of collected, for demos and tests."""
