"""From results.json to tables, charts and pages; free of torch."""
