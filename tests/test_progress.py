"""What a run shows of itself: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from registry.contract import Training
from registry.progress import make_watcher
from registry.training import Epoch


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_shows_epoch_loss_best_figure_and_time_left(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with make_watcher(console) as watcher:
        watcher.start(1111, "2 of 5", Training(epochs=15))
        for epoch in (1, 2, 3):
            for step in range(1, 11):
                watcher.step(epoch, step, 10)
            watcher.epoch(Epoch(epoch, 1.2345, 0.8 - epoch / 10, epoch < 3, 1.0, 0.1))
        watcher.step(4, 1, 10)
        (line,) = console.render_lines(watcher.progress.get_renderable(), pad=False)
        shown = "".join(segment.text for segment in line)
    for word in ("seed 1111 (2/5)", "━", "epoch 4", "loss 1.234", "best MAE 0.600 @2"):
        assert word in shown
    assert re.search(r"\d:\d\d left$", shown)
    assert "…" not in shown


def test_plain_lines():
    console = Console(file=io.StringIO(), width=80)
    with make_watcher(console) as watcher:
        watcher.note("a note")
        watcher.start(1, "1 of 1", Training())
        watcher.epoch(Epoch(1, 1.5, 0.25, True, 1.0, 0.1))
    note, seed, epoch = console.file.getvalue().splitlines()
    assert (note, seed) == ("a note", "seed 1 (1 of 1)")
    assert epoch.startswith("seed 1  epoch   1  train loss 1.5000  validation MAE 0.2500 (best)")
