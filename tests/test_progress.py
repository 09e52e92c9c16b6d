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


def test_a_bar_for_each_of_several_models_until_it_ends():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with make_watcher(console) as watcher:
        models = [watcher.beside(name) for name in ("self_mm:supervision=multimodal", "tfn")]
        for model in models:
            model.start(1111, "1 of 3", Training(epochs=15))
            model.step(1, 1, 2)
            model.epoch(Epoch(1, 1.2345, 0.6, True, 1.0, 0.1))
        shown = ["".join(part.text for part in line) for line in console.render_lines(watcher.progress, pad=False)]
        assert [line.split()[0] for line in shown] == ["self_mm:supervisi…", "tfn"]
        assert all("best MAE 0.600 @1" in line and len(line) <= 80 for line in shown)
        assert all("1111 (1/3)" in line and "…" not in line[20:] for line in shown)
        models[0].end()
        (line,) = console.render_lines(watcher.progress, pad=False)
        assert line[0].text.startswith("tfn")


def test_plain_lines_of_several_models_name_them():
    console = Console(file=io.StringIO(), width=80)
    with make_watcher(console) as watcher:
        model = watcher.beside("tfn+ulgm")
        model.start(7, "1 of 1", Training())
        model.epoch(Epoch(1, 1.5, 0.25, True, 1.0, 0.1))
    first, second = console.file.getvalue().splitlines()
    assert first == "tfn+ulgm seed 7 (1 of 1)"
    assert second.startswith("tfn+ulgm seed 7  epoch   1")
