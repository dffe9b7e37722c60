"""Train object detectors, plainly or with DAT, and measure their average precision, also under corruptions."""
