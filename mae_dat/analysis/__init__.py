"""Look into models: galleries, an interactive explorer, features, statistics, and the page that explains DAT."""
