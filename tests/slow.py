"""A device that takes its time."""

import threading
import time


class Slow:
    """Every call of an engine's device takes a while, one token a row; it can be counted, and made to fail."""

    def __init__(self, llm, monkeypatch, seconds):
        runner = llm.engine_thread.engine.runner
        self.calls, self.seconds, self.error = 0, seconds, None
        self._changed = threading.Condition()
        launch = runner.launch

        def slow(schedules):
            with self._changed:
                self.calls += 1
                self._changed.notify_all()
            time.sleep(self.seconds)
            if self.error is not None:
                raise self.error
            return launch(schedules)

        monkeypatch.setattr(runner, "launch", slow)
        monkeypatch.setattr(runner, "max_steps", 1)

    def until(self, calls):
        """Waits for so many calls."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.calls >= calls, 20)

    def fail(self, error):
        """All calls from now on."""
        self.error = error

    def stop(self):
        """No longer."""
        self.seconds, self.error = 0.0, None
