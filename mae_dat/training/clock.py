"""The clock of a training: its pace, the time of its epochs, and when to save."""

import time


class TrainingClock:
    """Measures the time of training: waiting for data counts, evaluating and saving does not."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.training_time = (0, 0.0)
        """Number and seconds of all laps."""
        self.start = self.last_save = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last lap."""
        self.last, self.last_cpu = time.monotonic(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Return the wall and processor seconds since the last `lap` or `restart`."""
        before = self.last, self.last_cpu
        self.restart()
        seconds = self.last - before[0]
        self.training_time = (self.training_time[0] + 1, self.training_time[1] + seconds)
        return seconds, self.last_cpu - before[1]

    def steps_per_second(self, step: int) -> float:
        """Return the pace since the start of this process, up to the last lap."""
        return (step - self.first_step) / (self.last - self.start)

    def saved(self) -> None:
        """Note that a checkpoint was saved now."""
        self.last_save = time.monotonic()

    def seconds_since_save(self) -> float:
        """Return the seconds since the last checkpoint, or since the start."""
        return time.monotonic() - self.last_save
