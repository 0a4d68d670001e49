"""Alarms reach the logs when the monitor is free to answer whoever reads them."""

import logging
import threading

import numpy as np

from tightrec.snapshot import monitor as module
from tightrec.snapshot.monitor import Monitor, MonitorConfig, score_histogram


def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels that bear them out."""
    scores = np.linspace(0.05, 0.6, count)
    return scores, (np.random.default_rng(0).random(count) < scores).astype(float)


def test_a_handler_of_the_logs_may_ask_the_monitor() -> None:
    monitor = Monitor(score_histogram(*rows(50_000)), MonitorConfig(window=1_000, least_rows=1_000))
    seen: list[tuple[int, list[str]]] = []

    class Asking(logging.Handler):
        def createLock(self) -> None:
            # Else the end of the process would wait for a thread that never returns from emit().
            self.lock = None

        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.levelno, sorted(monitor.active)))

    handler, log = Asking(), logging.getLogger(module.__name__)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def serve() -> None:
        scores, labels = rows(1_000)
        monitor.update(np.sqrt(scores), labels)
        monitor.update_labels(scores, labels)

    try:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waits for a lock that it holds"
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert seen[0] == (logging.WARNING, ["calibration", "ne", "psi"])
    assert seen[-1] == (logging.INFO, ["psi"])
