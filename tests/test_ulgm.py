"""ULGM on hand-computed numbers, its traps, and `UnimodalSupervision` in a plain loop."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from registry import DataInfo, TrainingData
from selfmm_plugin.parts import (
    BOUNDS,
    CENTERS,
    DISTANCES,
    MEMBERSHIPS,
    RELATIVES,
    WEIGHTINGS,
    growing_momentum,
    ratio_and_difference,
)
from selfmm_plugin.supervision import UlgmConfig, UlgmHook, UnimodalSupervision
from selfmm_plugin.ulgm import UnimodalLabelGenerator

LABELS = torch.tensor([2.0, 1.0, -1.0, -2.0, 0.0])
ALL = torch.arange(5)


def line(values: list[float]) -> torch.Tensor:
    """Features of width 1."""
    return torch.tensor(values)[:, None]


def generator(labels: torch.Tensor = LABELS, **options) -> UnimodalLabelGenerator:
    return UnimodalLabelGenerator(labels, {"fusion": 1, "speech": 1}, label_range=3.0, **options)


def filled(**options) -> UnimodalLabelGenerator:
    """Centres: fusion +2 and -2, speech +1 and -1 (a clip of label 0 lies at 10 in both)."""
    made = generator(**options)
    made.update({"fusion": line([3, 1, -1, -3, 10]), "speech": line([1, 1, -1, -1, 10])}, ALL, 1)
    return made


def test_epoch_one_stores_features_and_moves_nothing() -> None:
    made = filled()
    assert torch.equal(made.labels["speech"], LABELS)
    assert [float(c) for c in made.centers["fusion"]] == [2, -2]
    assert [float(c) for c in made.centers["speech"]] == [1, -1]
    assert torch.equal(made.weights(ALL)["speech"], torch.zeros(5))


def test_zero_counts_as_positive_when_asked() -> None:
    assert float(filled(exclude_zero=False).centers["fusion"][0]) == pytest.approx(14 / 3)


def test_one_move_by_hand() -> None:
    made = filled()
    made.update({"fusion": line([1.0]), "speech": line([0.4])}, torch.tensor([0]), 2)
    fusion = (3 - 1) / 1  # |1+2| to the negative centre, |1-2| to the positive one
    speech = (1.4 - 0.6) / 0.6
    proposal = 0.5 * speech / fusion * 2 + 0.5 * (2 + speech - fusion)
    expected = 1 / 3 * 2 + 2 / 3 * proposal
    assert float(made.labels["speech"][0]) == pytest.approx(expected, abs=1e-6)
    assert float(made.weights(torch.tensor([0]))["speech"]) == pytest.approx(math.tanh(abs(expected - 2)), abs=1e-6)
    assert torch.equal(made.labels["fusion"], LABELS)


@pytest.mark.parametrize("bound", ["clamp", "tanh"])
def test_a_proposal_that_is_not_finite_moves_no_label(bound) -> None:
    made = filled(bound=bound, combination=lambda s, f, y: s * torch.tensor([math.inf, -math.inf, math.nan, 1.0, 1.0]))
    before = made.labels["speech"].clone()
    made.update({"fusion": line([1.0, -1, 1, -1, 0]), "speech": line([0.4, -0.4, 0.4, -0.4, 0.2])}, ALL, 2)
    moved = made.labels["speech"] != before
    assert moved.tolist() == [False, False, False, True, True]


def test_labels_stay_in_range_where_the_fusion_distance_vanishes() -> None:
    made = filled()
    for epoch in range(2, 40):
        made.update({"fusion": line([0.0] * 5), "speech": line([1.0, -1.0, 0.0, 1.0, -1.0])}, ALL, epoch)
        assert made.labels["speech"].isfinite().all()
        assert made.labels["speech"].abs().max() <= 3


@pytest.mark.parametrize("labels", [LABELS.abs(), -LABELS.abs(), torch.zeros(5)])
def test_labels_stay_where_a_class_is_empty(labels: torch.Tensor) -> None:
    made = generator(labels)
    for epoch in (1, 2, 3):
        made.update({"fusion": line([3, 1, -1, -3, 0]), "speech": line([1, 2, 3, 4, 5])}, ALL, epoch)
    assert torch.equal(made.labels["speech"], labels)


def test_only_the_modality_with_an_empty_class_stays() -> None:
    known = {"speech": torch.full((5,), 1.0)}
    made = UnimodalLabelGenerator(LABELS, {"fusion": 1, "speech": 1, "face": 1}, 3.0, known=known)
    features = {"fusion": line([3, 1, -1, -3, 0]), "speech": line([1, 2, 3, 4, 5]), "face": line([1, 1, -1, -1, 0.3])}
    for epoch in (1, 2):
        made.update(features, ALL, epoch)
    assert torch.equal(made.labels["speech"], known["speech"])
    assert not torch.equal(made.labels["face"], LABELS)


@pytest.mark.parametrize("labels", [LABELS.abs(), -LABELS.abs()])
def test_labels_stay_where_the_multimodal_ones_are_of_one_class(labels: torch.Tensor) -> None:
    known = torch.tensor([1.0, -1.0, 1.0, float("nan"), float("nan")])
    made = generator(labels, known={"speech": known})
    for epoch in (1, 2, 3):
        made.update({"fusion": line([3, 1, 2, 4, 5]), "speech": line([1, -2, 3, 4, -5])}, ALL, epoch)
    assert all(center.any() for center in made.centers["speech"])
    assert torch.equal(made.labels["speech"][3:], labels[3:])


def test_a_label_of_zero_stays_finite_where_the_denominator_vanishes() -> None:
    """Without care 0 / 0 would make a label NaN, and it would stay NaN."""
    sides = torch.tensor([[1.0, 1.0]] * 2 + [[-1.0, -1.0]] * 2 + [[0.0, 0.0]])
    made = UnimodalLabelGenerator(
        LABELS,
        {"fusion": 2, "speech": 2},
        3.0,
        distance=lambda features, center: torch.where(center[0] > 0, features[:, 0], features[:, 1]),
    )
    made.update({"fusion": sides, "speech": sides}, ALL, 1)
    # Features are distances here: δ = -1e-8, so that δ + 1e-8 = 0.
    fusion, speech = torch.tensor([[0.0, -1e-16]]), torch.tensor([[1.0, 2.0]])
    assert float(fusion[0, 1] / torch.tensor(1e-8) + 1e-8) == 0
    made.update({"fusion": fusion, "speech": speech}, torch.tensor([4]), 2)
    assert made.labels["speech"].isfinite().all()


def test_features_that_are_not_finite_count_as_missing() -> None:
    made, without = generator(), generator()
    features = {"fusion": line([3, 1, -1, -3, 0]), "speech": line([1, 2, -1, -1, 0])}
    broken = {"fusion": features["fusion"], "speech": line([1, math.nan, -1, -math.inf, 0])}
    mask = {"speech": torch.tensor([True, False, True, False, True])}
    for epoch in (1, 2, 3):
        made.update(broken, ALL, epoch)
        without.update(features, ALL, epoch, mask)
    assert torch.equal(made.labels["speech"], without.labels["speech"])
    assert torch.equal(made.centers["speech"][0], without.centers["speech"][0])
    before = made.labels["speech"].clone()
    made.update({"fusion": line([math.nan] * 5), "speech": features["speech"]}, ALL, 4)
    assert torch.equal(made.labels["speech"], before)


def test_features_so_large_that_their_distance_overflows_move_no_label() -> None:
    made = filled(distance="squared")
    made.update({"fusion": line([1.0, 1e30]), "speech": line([1e30, 0.4])}, torch.tensor([0, 1]), 2)
    made.update({"fusion": line([1.0] * 5), "speech": line([0.4] * 5)}, ALL, 3)
    assert made.labels["speech"].isfinite().all()


def test_features_too_large_to_be_summed_count_as_missing() -> None:
    made = filled()
    made.update({"fusion": line([1.0, 1e38]), "speech": line([1.0, 1e38])}, torch.tensor([0, 1]), 1)
    assert made.memory["fusion"].features[:2, 0].tolist() == [1, 1]
    assert made.memory["speech"].features[:2, 0].tolist() == [1, 1]


def test_of_a_clip_that_is_twice_in_a_batch_the_last_features_count() -> None:
    made, once = filled(), filled()
    twice = {"fusion": line([9.0, 1.0, 2.0]), "speech": line([9.0, 0.4, 0.2])}
    for epoch in (1, 2):
        made.update(twice, torch.tensor([0, 0, 1]), epoch)
        once.update({name: values[1:] for name, values in twice.items()}, torch.tensor([0, 1]), epoch)
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), once.buffers(), strict=True))


@pytest.mark.parametrize("given", [[1.0, 0.0, 1.0, 1.0, 1.0], [1, 0, 1, 1, 1], [True, False, True, True, True]])
def test_a_mask_of_any_dtype(given: list) -> None:
    made, expected = generator(), generator()
    features = {"fusion": line([3, 1, -1, -3, 0]), "speech": line([1, 99, -1, -1, 0])}
    for epoch in (1, 2):
        made.update(features, ALL, epoch, {"speech": torch.tensor(given)})
        expected.update(features, ALL, epoch, {"speech": torch.tensor([True, False, True, True, True])})
    assert torch.equal(made.labels["speech"], expected.labels["speech"])


@pytest.mark.parametrize("mask", [{"speach": torch.ones(5)}, {"fusion": torch.ones(5)}, {"speech": torch.ones(4)}])
def test_a_mask_that_does_not_fit_is_named(mask: dict) -> None:
    made = supervision()
    with pytest.raises(ValueError, match=r"mask\['\w+'\] must be a modality \(speech, face\) and have shape \(5,\)"):
        made.loss(some_features(), ALL, mask)


def test_known_labels_never_move_and_count_in_full() -> None:
    nan = float("nan")
    made = filled(known={"speech": torch.tensor([nan, 1.5, nan, nan, nan])})
    made.update({"fusion": line([1, 1, 1, 1, 1]), "speech": line([0.4] * 5)}, ALL, 2)
    assert float(made.labels["speech"][1]) == 1.5
    assert float(made.labels["speech"][0]) != 2.0
    assert float(made.weights(ALL)["speech"][1]) == 1.0


def test_a_masked_clip_moves_no_label_and_enters_no_centre() -> None:
    made = generator()
    mask = {"speech": torch.tensor([True, False, True, True, True])}
    made.update({"fusion": line([3, 1, -1, -3, 0]), "speech": line([1, 99, -1, -1, 0])}, ALL, 1, mask)
    assert float(made.centers["speech"][0]) == 1
    made.update({"fusion": line([1, 1, -1, -3, 0]), "speech": line([0.4, 99, -1, -1, 0])}, ALL, 2, mask)
    assert float(made.labels["speech"][1]) == float(LABELS[1])
    assert float(made.labels["speech"][0]) != float(LABELS[0])


def test_a_batch_of_one_and_an_order_of_batches() -> None:
    whole, single = generator(), generator()
    features = {"fusion": line([3, 1, -1, -3, 0]), "speech": line([1, 2, -1, -2, 0])}
    whole.update(features, ALL, 1)
    for row in ALL.split(1):
        single.update({name: values[row] for name, values in features.items()}, row, 1)
    assert torch.equal(whole.centers["speech"][0], single.centers["speech"][0])


def test_distances() -> None:
    features, center = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0.0, 0.0])
    assert DISTANCES["l2"](features, center).tolist() == [5, 2]
    assert DISTANCES["squared"](features, center).tolist() == pytest.approx([25 / 2**0.5, 4 / 2**0.5])
    assert DISTANCES["cosine"](features, torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.2, 0.0])
    close = torch.rand(500, 7, generator=torch.Generator().manual_seed(0))
    assert min(float(DISTANCES["cosine"](row[None], row)) for row in close) == 0  # never below, by rounding
    custom = generator(distance=lambda features, center: (features - center).abs().sum(-1))
    assert float(custom.distance(torch.tensor([[1.0, -1.0]]), torch.zeros(2))) == 2


# --- parts


def moved(**options) -> UnimodalLabelGenerator:
    """Clip 0 (y = 2) lies 1 and 3 from the fusion centres, +2 and -2, and 0.6 and 1.4 from speech's, +1 and -1."""
    made = filled(**options)
    made.update({"fusion": line([1.0]), "speech": line([0.4])}, torch.tensor([0]), 2)
    return made


@pytest.mark.parametrize(
    ("options", "proposal"),
    [
        ({}, 4 / 3),  # δ_f = 2 / 1, δ_s = 0.8 / 0.6: ½ · (4/3) / 2 · 2 + ½ · (2 + 4/3 − 2)
        ({"distance": "squared"}, -2 / 9),  # δ_f = 8 / 1, δ_s = 1.6 / 0.36 = 40/9: 5/9 + ½ · (2 + 40/9 − 8)
        ({"distance": lambda f, c: (f - c).abs().sum(-1) + 1}, 1.25),  # δ_f = 2 / 2, δ_s = 0.8 / 1.6: 0.5 + 0.75
        ({"relative": "centers"}, 1.75),  # δ_f = 2 / 4, δ_s = 0.8 / 2: 0.8 + ½ · (2 + 0.4 − 0.5)
        ({"relative": "difference"}, 0.8),  # δ_f = 2, δ_s = 0.8: 0.4 + ½ · (2 + 0.8 − 2)
        ({"relative": lambda p, n, between: (n - p) / between + 1}, 14 / 15 + 0.95),  # δ_f = 1.5, δ_s = 1.4
        ({"distance": "squared", "relative": "centers"}, 1.75),  # δ_f = 8 / 16, δ_s = 1.6 / 4
        ({"bound": "tanh"}, 3 * math.tanh(4 / 9)),
        ({"bound": lambda proposal, label_range: proposal.clamp(max=label_range / 3)}, 1.0),
        ({"combination": lambda s, f, y: f * y - s}, 4 - 4 / 3),
    ],
)
def test_a_proposal_by_hand(options: dict, proposal: float) -> None:
    assert float(moved(**options).labels["speech"][0]) == pytest.approx(1 / 3 * 2 + 2 / 3 * proposal, abs=1e-6)


def test_cosine_by_hand() -> None:
    made = UnimodalLabelGenerator(LABELS[:3], {"fusion": 2, "speech": 2}, 3.0, distance="cosine", relative="centers")
    axes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    made.update({"fusion": axes, "speech": axes}, torch.arange(3), 1)
    made.update({"fusion": torch.tensor([[3.0, 4.0]]), "speech": torch.tensor([[2.0, 0.0]])}, torch.tensor([1]), 2)
    # The centres are at right angles, 1 apart: δ_f = 0.2 − 0.4, δ_s = 1 − 0, y = 1, so −2.5 + ½ · (1 + 1 + 0.2) = −1.4.
    assert float(made.labels["speech"][1]) == pytest.approx(1 / 3 * 1 - 2 / 3 * 1.4, abs=1e-6)


@pytest.mark.parametrize(("momentum", "label"), [(lambda epoch: 0.75, 1.5 + 1 / 3), (lambda epoch: 1 / epoch, 5 / 3)])
def test_a_momentum_by_hand(momentum, label: float) -> None:
    """The share of the old label, 2; the rest is the proposal's, 4/3."""
    assert float(moved(momentum=momentum).labels["speech"][0]) == pytest.approx(label, abs=1e-6)


def test_a_momentum_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"momentum must give a share from 0 to 1, got 1\.5 for epoch 2"):
        moved(momentum=lambda epoch: 1.5)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("tanh", math.tanh(4 / 9)), ("relu", 4 / 9), ("ones", 1.0), (lambda difference: difference**2, 16 / 81)],
)
def test_weights_by_hand(weighting, weight: float) -> None:
    """The label of clip 0 has moved from 2 to 14/9, that of clip 1 is known."""
    nan = float("nan")
    made = moved(weighting=weighting, known={"speech": torch.tensor([nan, 1.0, nan, nan, nan])})
    assert made.weights(torch.tensor([0, 1]))["speech"].tolist() == pytest.approx([weight, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("membership", "centers"),
    [("own", [1, 1 / 3]), ("fusion", [2, -1]), (lambda own, multimodal: -own, [1 / 3, 1])],
)
def test_membership_by_hand(membership, centers: list[float]) -> None:
    """Clip 1, at 3, is negative in speech and positive in all."""
    nan = float("nan")
    made = generator(membership=membership, known={"speech": torch.tensor([nan, -1.0, nan, nan, nan])})
    made.update({"fusion": line([3, 1, -1, -3, 10]), "speech": line([1, 3, -1, -1, 10])}, ALL, 1)
    assert [float(c) for c in made.centers["speech"]] == pytest.approx(centers)


@pytest.mark.parametrize(
    ("options", "center"),
    [
        ({}, 2.5),
        ({"centers": "ema"}, 0.9 * 1 + 0.1 * 2.5),
        ({"centers": "ema", "center_decay": 0.5}, 1.75),
        ({"centers": lambda centers, means: centers + means}, 3.5),
    ],
)
def test_centres_step_by_step_by_hand(options: dict, center: float) -> None:
    made = filled(**options)
    assert [float(c) for c in made.centers["speech"]] == [1, -1]
    made.update({"fusion": line([3.0]), "speech": line([4.0])}, torch.tensor([0]), 1)  # beside clip 1, at 1
    assert float(made.centers["speech"][0]) == pytest.approx(center)


def test_centres_once_an_epoch() -> None:
    made, again = filled(centers="epoch"), generator(centers="epoch")
    for step in (1, 2):
        made.update({"fusion": line([1.0]), "speech": line([0.4])}, torch.tensor([0]), 2)
        assert [float(c) for c in made.centers["speech"]] == [1, -1]
        if step == 1:  # as `step` would, whose centres are the same here
            assert torch.equal(made.labels["speech"], moved().labels["speech"])
    again.load_state_dict(made.state_dict())
    for one in (made, again):
        one.update({"fusion": line([1.0]), "speech": line([9.0])}, torch.tensor([0]), 3)
        assert float(one.centers["speech"][0]) == pytest.approx((0.4 + 1) / 2)
    assert torch.equal(made.labels["speech"], again.labels["speech"])


def test_centres_of_no_epoch_before_move_nothing() -> None:
    made = generator(centers="epoch")
    for row in ALL.split(1):
        made.update({"fusion": line([1.0]), "speech": line([0.4])}, row, 7)
    assert torch.equal(made.labels["speech"], LABELS)


@pytest.mark.parametrize("centers", ["step", "epoch", "ema"])
def test_a_class_that_vanishes_keeps_its_centre_and_labels_stay_until_it_starts_anew(centers: str) -> None:
    made = filled(centers=centers)
    made.update({"fusion": line([3.0]), "speech": line([1.0])}, torch.tensor([0]), 2)
    own = made.memory["speech"].labels
    own.fill_(-1.0)
    for epoch in (3, 4):
        made.update({"fusion": line([1.0] * 5), "speech": line([4.0, 4.0, 0.4, 0.4, 0.4])}, ALL, epoch)
        if epoch == 3 and centers != "epoch":  # these centres were made before the class vanished
            own.fill_(-1.0)
    assert torch.equal(own, torch.full((5,), -1.0))
    assert float(made.centers["speech"][0]) == 1
    own.copy_(LABELS)
    made.update({"fusion": line([1.0]), "speech": line([4.0])}, torch.tensor([0]), 5)
    assert float(made.centers["speech"][0]) == 4


@pytest.mark.parametrize("part", ["distance", "relative", "combination", "bound"])
def test_a_part_that_gives_nan_moves_no_label(part: str) -> None:
    made = moved(**{part: lambda first, *rest: first.view(len(first), -1)[:, 0] * math.nan})
    made.update({"fusion": line([1.0] * 5), "speech": line([0.4] * 5)}, ALL, 3)
    assert torch.equal(made.labels["speech"], LABELS)


def test_centres_that_are_nan_are_not_taken() -> None:
    made = moved(centers=lambda centers, means: means * math.nan)
    assert [float(c) for c in made.centers["speech"]] == [1, -1]
    before = made.labels["speech"].clone()
    made.update({"fusion": line([1.0] * 5), "speech": line([0.4] * 5)}, ALL, 3)
    assert torch.equal(made.labels["speech"], before)


WIDTHS = {"fusion": 5, "text": 2, "speech": 3}


def clustered(draw: torch.Generator, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features that follow the labels more or less, not the same in every task."""
    return {name: labels[:, None] / d + torch.randn(len(labels), d, generator=draw) for name, d in WIDTHS.items()}


def move(
    labels: torch.Tensor, features: torch.Tensor, of_fusion: torch.Tensor, multimodal: torch.Tensor, epoch: int
) -> torch.Tensor:
    """The docstring's three steps for the labels of one modality, from δ of the fusion task."""
    delta = relative_to_positive(features, labels)
    proposal = 0.5 * delta / of_fusion * multimodal + 0.5 * (multimodal + delta - of_fusion)
    return ((epoch - 1) * labels + 2 * proposal.clamp(-3, 3)) / (epoch + 1)


def relative_to_positive(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    positive, negative = (features[side].mean(0) for side in (labels > 0, labels < 0))
    to_positive, to_negative = ((features - center).square().sum(1).sqrt() for center in (positive, negative))
    return (to_negative - to_positive) / to_positive


def test_tasks_of_different_widths_are_as_each_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    multimodal = torch.randn(40, generator=draw).clamp(-3, 3)
    made = UnimodalLabelGenerator(multimodal, WIDTHS, 3.0)
    expected = dict.fromkeys(WIDTHS, multimodal)
    features = clustered(draw, multimodal)
    rows = torch.arange(40)
    made.update(features, rows, 1)
    for epoch in (2, 3):  # with the same features, whose centres are those of the labels as they stand
        of_fusion = relative_to_positive(features["fusion"], multimodal)
        for name in ("text", "speech"):
            expected[name] = move(expected[name], features[name], of_fusion, multimodal, epoch)
        made.update(features, rows, epoch)
        for name, d in WIDTHS.items():
            torch.testing.assert_close(made.labels[name], expected[name], atol=1e-4, rtol=0)
            torch.testing.assert_close(made.memory[name].features, features[name])
            assert made.centers[name][0].shape == (d,)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("others", [{}, {"membership": "fusion", "relative": "centers", "bound": "tanh"}])
def test_parts_passed_as_callables_are_as_those_by_name(distance: str, others: dict) -> None:
    """What is passed is called task by task, with features of the task's own width."""
    draw = torch.Generator().manual_seed(0)
    labels, rows = torch.randn(12, generator=draw).clamp(-3, 3), torch.arange(12)
    names = {"distance": distance, "membership": "own", "relative": "positive", "bound": "clamp", **others}
    passed = {part: lambda *x, table=TABLES[part], name=name: table[name](*x) for part, name in names.items()}
    passed["combination"] = lambda *x: ratio_and_difference(*x)
    passed["centers"] = lambda centers, means: means
    by_name = UnimodalLabelGenerator(labels, WIDTHS, 3.0, **names)
    by_call = UnimodalLabelGenerator(labels, WIDTHS, 3.0, **passed)
    for epoch in (1, 2, 3):
        features = clustered(draw, labels)
        for made in (by_name, by_call):
            made.update(features, rows, epoch)
    for name in WIDTHS:
        torch.testing.assert_close(by_name.labels[name], by_call.labels[name], atol=1e-4, rtol=0)
        torch.testing.assert_close(by_name.centers[name], by_call.centers[name])
    assert not torch.equal(by_name.labels["text"], labels)


def test_what_users_pass_gets_what_its_type_says() -> None:
    shapes: dict[str, list] = {name: [] for name in (*TABLES, "combination")}

    def watched(name: str, part):
        def call(*given):
            shapes[name].append([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in given])
            return part(*given)

        return call

    parts = {name: watched(name, next(iter(table.values()))) for name, table in TABLES.items()}
    made = UnimodalLabelGenerator(
        LABELS, WIDTHS, 3.0, **parts, combination=watched("combination", ratio_and_difference)
    )
    made.update({name: torch.ones(4, d) for name, d in WIDTHS.items()}, torch.arange(4), 2)
    made.weights(torch.arange(4))
    assert [(4, 5), (5,)] in shapes["distance"]
    assert [(4, 2), (2,)] in shapes["distance"]
    assert shapes["relative"] == [[(4,), (4,), ()]] * 3
    assert shapes["combination"] == [[(4,), (4,), (4,)]] * 2
    assert shapes["bound"] == [[(4,), 3.0]] * 2
    assert shapes["membership"] == [[(5,), (5,)]] * 3
    assert shapes["centers"] == [[(2, d), (2, d)] for d in WIDTHS.values()]
    assert shapes["weighting"] == [[(4,)]] * 2


# --- epochs as tensors, and the number of operations


@pytest.mark.parametrize("centers", CENTERS)
@pytest.mark.parametrize("momentum", [growing_momentum, lambda epoch: 0.75, lambda epoch: 1 / epoch])
def test_an_epoch_as_a_tensor_gives_the_same(centers: str, momentum) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randn(12, generator=draw).clamp(-3, 3)
    one, two = (UnimodalLabelGenerator(labels, WIDTHS, 3.0, centers=centers, momentum=momentum) for _ in range(2))
    counted = torch.zeros((), dtype=torch.long)
    for epoch in (1, 2, 3):
        counted.fill_(epoch)
        for rows in torch.randperm(12, generator=draw).split(5):
            features = {name: torch.randn(len(rows), d, generator=draw) for name, d in WIDTHS.items()}
            one.update(features, rows, epoch)
            two.update(features, rows, counted)
            for name, state in one.state_dict().items():
                assert torch.equal(state, two.state_dict()[name]), (epoch, name)
    assert not torch.equal(one.labels["text"], labels)


def test_in_epoch_one_as_a_tensor_nothing_moves_whatever_the_momentum() -> None:
    made = filled(momentum=lambda epoch: 1 / (epoch - 1))
    made.update({"fusion": line([1.0] * 5), "speech": line([0.4] * 5)}, ALL, torch.tensor(1))
    assert torch.equal(made.labels["speech"], LABELS)


@pytest.mark.parametrize("epoch", [torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, device="meta")])
def test_an_epoch_as_a_tensor_is_one_integer_beside_the_labels(epoch: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="an epoch given as a tensor must be one integer on cpu, got torch"):
        generator().update({"fusion": line([0] * 5), "speech": line([0] * 5)}, ALL, epoch)


class Operations(TorchDispatchMode):
    """Counts the operations that start something on a device, which views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [value.alias_info for value in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modalities", [1, 3, 6])
def test_the_operations_are_few_and_no_more_for_more_tasks(modalities: int) -> None:
    dims = {"fusion": 128, **{str(i): 16 * (i + 1) for i in range(modalities)}}
    made = UnimodalSupervision(torch.linspace(-3, 3, 64), dims, 3.0, head_dims=8)
    rows = torch.arange(16)
    features = {name: torch.randn(16, 128 if name == "fusion" else 8) for name in dims}
    second = torch.tensor(2)
    for limit, call in (
        (14, lambda: made.generator.update(features, rows, 1)),
        (32, lambda: made.generator.update(features, rows, 2)),
        (37, lambda: made.generator.update(features, rows, second)),
        (6, lambda: made.generator.weights(rows)),
    ):
        with Operations() as seen:
            call()
        assert len(seen.names) <= limit, seen.names
    given = {name: torch.randn(16, d) for name, d in dims.items()}
    with Operations() as heads:
        made.predict(given)
    with Operations() as seen:
        made.loss(given, rows)
    assert len(seen.names) - len(heads.names) <= 12


TABLES = {
    "distance": DISTANCES,
    "membership": MEMBERSHIPS,
    "centers": CENTERS,
    "relative": RELATIVES,
    "bound": BOUNDS,
    "weighting": WEIGHTINGS,
}
OTHERS = {"distance": "squared", "membership": "fusion", "relative": "centers", "bound": "tanh", "weighting": "relu"}


@settings(max_examples=100, deadline=None)
@given(
    parts=st.sampled_from([dict(zip(TABLES, names, strict=True)) for names in itertools.product(*TABLES.values())]),
    exclude_zero=st.booleans(),
    label_range=st.sampled_from([0.1, 1.0, 3.0]),
    classes=st.sampled_from([(-1, 0, 1), (0, 1), (-1, 0), (-1, 1), (0,)]),
    scale=st.sampled_from([0.0, 1e-20, 1e-4, 1.0, 1e4, 1e14, 1e25]),
    seed=st.integers(0, 2**31),
)
def test_labels_stay_finite_and_in_range_whatever_the_parts(
    parts: dict, exclude_zero: bool, label_range: float, classes: tuple, scale: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    n, dims = 6, {"fusion": 3, "text": 2, "speech": 1}
    signs = torch.tensor(classes)[torch.randint(len(classes), (n,), generator=draw)]
    labels = signs * torch.rand(n, generator=draw) * label_range
    known = {"text": torch.where(torch.rand(n, generator=draw) < 0.2, labels, math.nan)}
    made = UnimodalLabelGenerator(labels, dims, label_range, exclude_zero=exclude_zero, known=known, **parts)
    for epoch in (1, 2, 3, 9):
        for rows in torch.randperm(n, generator=draw).split(4):
            features = {name: scale * torch.randn(len(rows), width, generator=draw) for name, width in dims.items()}
            made.update(features, rows, epoch, {"speech": torch.rand(len(rows), generator=draw) < 0.8})
            for name in ("text", "speech"):
                assert made.labels[name].isfinite().all()
                assert (made.labels[name].abs() <= torch.tensor(label_range)).all()
                assert made.weights(torch.arange(n))[name].isfinite().all()
                assert all(center.isfinite().all() for center in made.centers[name])


@pytest.mark.parametrize("names", [[], ["speech"], ["text", "a.b", "a_b", "type", "training", "left eye"]])
def test_modalities_of_any_name_and_number(names: list[str]) -> None:
    torch.manual_seed(0)
    dims = {"fusion": 4, **{name: 2 + i for i, name in enumerate(names)}}
    made, again = (UnimodalSupervision(LABELS, dims, 3.0, head_dims=3) for _ in range(2))
    for epoch in (1, 2, 3):
        features = {name: torch.randn(5, width, requires_grad=True) for name, width in dims.items()}
        loss = features["fusion"].sum() + made.loss(features, ALL)
        loss.backward()
        made.observe(ALL, epoch)
    assert list(made.generator.labels) == ["fusion", *names]
    assert list(made.predict(features)) == list(made.generator.weights(ALL)) == names
    assert all(not torch.equal(made.generator.labels[name], LABELS) for name in names)
    again.load_state_dict(made.state_dict())
    assert all(torch.equal(again.generator.labels[name], made.generator.labels[name]) for name in names)


def test_every_part_reaches_the_generator() -> None:
    parts = {name: lambda *_: None for name in (*TABLES, "combination", "momentum")}
    made = UnimodalSupervision(LABELS, {"fusion": 1, "speech": 1}, 3.0, **parts).generator
    assert {name: getattr(made, "center_rule" if name == "centers" else name) for name in parts} == parts
    made = UnimodalSupervision(LABELS, {"fusion": 1}, 3.0, centers="ema", center_decay=0.25).generator
    assert float(made.center_rule(torch.tensor(0.0), torch.tensor(4.0))) == 3


def test_state_goes_through_a_state_dict_and_needs_no_gradient() -> None:
    made, again = filled(), generator()
    made.update({"fusion": line([1.0]), "speech": line([0.4])}, torch.tensor([0]), 2)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.labels["speech"], made.labels["speech"])
    assert not list(made.parameters())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"labels": torch.zeros(2, 2)}, "shape"),
        ({"labels": torch.tensor([1.0, float("nan")])}, "finite"),
        ({"feature_dims": {"text": 3}}, "fusion"),
        ({"label_range": 0.0}, "positive"),
        ({"distance": "manhattan"}, "distance must be a callable or one of l2, squared, cosine, got 'manhattan'"),
        ({"membership": "owm"}, "membership must be a callable or one of own, fusion, got 'owm'"),
        ({"centers": None}, "centers must be a callable or one of step, epoch, ema, got None"),
        ({"relative": "negative"}, "relative must be a callable or one of positive, centers, difference, got"),
        ({"bound": ["clamp"]}, "bound must be a callable or one of clamp, tanh, got"),
        ({"weighting": "one"}, "weighting must be a callable or one of tanh, relu, ones, got 'one'"),
        ({"combination": "half"}, "combination must be a callable, got 'half'"),
        ({"momentum": 0.9}, "momentum must be a callable, got 0.9"),
        ({"label_range": 0.0}, "label_range must be positive, got 0"),
        ({"center_decay": 1.0}, "center_decay must be at least 0 and below 1, got 1.0"),
        ({"known": {"speech": torch.zeros(3)}}, "known"),
        ({"known": {"fusion": torch.zeros(5)}}, "known"),
        ({"known": {"speech": torch.full((5,), math.inf)}}, "known"),
    ],
)
def test_wrong_arguments_are_named(options: dict, word: str) -> None:
    arguments = {"labels": LABELS, "feature_dims": {"fusion": 1, "speech": 1}, "label_range": 3.0, **options}
    with pytest.raises(ValueError, match=word):
        UnimodalLabelGenerator(**arguments)


def test_wrong_features_are_named() -> None:
    with pytest.raises(ValueError, match=r"features\['speech'\] must have shape \(5, 1\), got nothing"):
        generator().update({"fusion": line([0] * 5)}, ALL, 1)


def supervision() -> UnimodalSupervision:
    torch.manual_seed(0)
    return UnimodalSupervision(LABELS, {"fusion": 4, "speech": 3, "face": 2}, 3.0, head_dims=5)


def some_features() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(5, width, requires_grad=True) for name, width in (("fusion", 4), ("speech", 3), ("face", 2))
    }


def test_supervision_gives_heads_zero_rather_than_absent_gradients_in_epoch_one() -> None:
    made = supervision()
    made.loss(some_features(), ALL).backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


def test_supervision_trains_heads_and_features_once_labels_have_moved() -> None:
    made, features = supervision(), some_features()
    for epoch in (1, 2):
        made.loss(features, ALL).backward()
        made.observe(ALL, epoch)
    loss = made.loss(features, ALL)
    loss.backward()
    assert float(loss.detach()) > 0
    assert features["speech"].grad is not None
    assert features["speech"].grad.any()


def test_several_losses_are_observed_in_their_order() -> None:
    one, two, features = supervision(), supervision(), some_features()
    for epoch in (1, 2):
        for rows in ALL.split(2):
            one.loss({name: values[rows] for name, values in features.items()}, rows)
            one.observe(rows, epoch)
        # No label moves within a loss, so losses first and observations after must give the same.
        for rows in ALL.split(2):
            two.loss({name: values[rows] for name, values in features.items()}, rows)
        for rows in ALL.split(2):
            two.observe(rows, epoch)
    assert torch.equal(one.generator.labels["face"], two.generator.labels["face"])


def test_observe_without_its_loss_is_an_error() -> None:
    made, features = supervision(), some_features()
    with pytest.raises(RuntimeError, match="must follow loss"):
        made.observe(ALL, 1)
    made.loss(features, ALL)
    with pytest.raises(RuntimeError, match="another index"):
        made.observe(ALL.flip(0), 1)
    made.eval()
    made.loss(features, ALL)
    with pytest.raises(RuntimeError, match="must follow loss"):
        made.observe(ALL, 1)


def test_losses_that_nobody_observes_are_an_error_after_an_epoch() -> None:
    made, features = supervision(), some_features()
    for _ in range(2):
        for _ in range(2):
            made.loss(features, ALL)
        with pytest.raises(RuntimeError, match="must follow every loss in training mode; 11 clips wait"):
            made.loss({name: values[:1] for name, values in features.items()}, ALL[:1])


def test_rows_as_a_list_or_an_array() -> None:
    made, features = supervision(), some_features()
    for rows in (ALL.tolist(), ALL.numpy()):
        made.loss(features, rows)  # type: ignore[arg-type]
        made.observe(rows, 1)  # type: ignore[arg-type]
    assert made.generator.centers["speech"][0].any()


@pytest.mark.parametrize("epoch", [0, -1, 1.5, float("nan"), None])
def test_epochs_count_from_one(epoch) -> None:
    made = supervision()
    made.loss(some_features(), ALL)
    with pytest.raises(ValueError, match="epoch counts from 1, got"):
        made.observe(ALL, epoch)


def test_a_masked_clip_adds_no_loss() -> None:
    made, features = supervision(), some_features()
    for epoch in (1, 2):
        made.loss(features, ALL)
        made.observe(ALL, epoch)
    nobody = {name: torch.zeros(5, dtype=torch.bool) for name in ("speech", "face")}
    assert float(made.loss(features, ALL, nobody).detach()) == 0


def test_a_masked_clips_features_may_be_anything() -> None:
    made, clean = supervision(), some_features()
    nan = {name: values.detach().clone() for name, values in clean.items()}
    nan["speech"][1] = math.nan
    nan["speech"].requires_grad_()
    mask = {"speech": torch.arange(5) != 1}
    for epoch in (1, 2):
        made.loss(clean, ALL, mask)
        made.observe(ALL, epoch)
    loss = made.loss(nan, ALL, mask)
    assert float(loss.detach()) == float(made.loss(clean, ALL, mask).detach()) > 0
    loss.backward()
    assert nan["speech"].grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_dropout_stands_before_each_head() -> None:
    dropouts = {"speech": 0.5, "face": 0.0}
    made = UnimodalSupervision(LABELS, {"fusion": 4, "speech": 64, "face": 64}, 3.0, head_dropouts=dropouts)
    features = {name: torch.randn(5, 64) for name in dropouts}
    first, second = made.predict(features), made.predict(features)
    assert not torch.equal(first["speech"], second["speech"])
    assert torch.equal(first["face"], second["face"])
    made.eval()
    assert torch.equal(made.predict(features)["speech"], made.predict(features)["speech"])


def test_it_can_be_pickled_whole() -> None:
    made = filled(centers="ema", **OTHERS)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again.labels["speech"], made.labels["speech"])


def test_features_that_are_missing_are_refused() -> None:
    supervision = UnimodalSupervision(LABELS, {"fusion": 1, "speech": 1}, label_range=3.0)
    for features in ({"speech": line([1.0])}, {"fusion": line([1.0])}):
        with pytest.raises(ValueError, match=r"features\['(fusion|speech)'\] is missing, got (fusion|speech)"):
            supervision.loss(features, torch.tensor([0]))


def test_autocast_does_not_lower_the_precision_of_the_centres() -> None:
    torch.manual_seed(0)
    features = {"fusion": torch.randn(5, 1), "speech": torch.randn(5, 1)}
    plain, cast = generator(), generator()
    plain.update(features, ALL, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(features, ALL, 1)
    assert torch.equal(plain.centers["speech"][0], cast.centers["speech"][0])


def test_what_was_stored_before_a_clip_lost_a_modality_still_counts() -> None:
    made = filled()
    made.update({"fusion": line([3]), "speech": line([99])}, torch.tensor([0]), 1, {"speech": torch.tensor([False])})
    assert [float(c) for c in made.centers["speech"]] == [1, -1]


def test_a_mask_reaches_the_generator_through_loss_and_observe() -> None:
    made, features = supervision(), some_features()
    mask = {"speech": torch.arange(5) != 1}
    for epoch in (1, 2, 3):
        made.loss(features, ALL, mask)
        made.observe(ALL, epoch)
    memory = made.generator.memory["speech"]
    assert memory.labels[1] == LABELS[1]
    assert not memory.features[1].any()
    assert memory.features[0].any()
    assert memory.labels[0] != LABELS[0]


def hook(**keys) -> UlgmHook:
    info = DataInfo("test", {}, {}, 5, 3.0, ("M",), False, None)
    return UlgmHook(UlgmConfig(**keys), TrainingData({"M": LABELS}, info), {"audio": 2, "text": 4, "fusion": 3})


def test_every_key_of_the_hook_reaches_its_place() -> None:
    made = hook(
        label_range=1.5,
        **OTHERS,
        centers="ema",
        center_decay=0.5,
        exclude_zero=False,
        head_dims={"text": 7},
        head_dropouts={"text": 0.4},
    ).supervision
    assert made.generator.label_range == 1.5
    assert all(getattr(made.generator, name) is TABLES[name][value] for name, value in OTHERS.items())
    assert float(made.generator.center_rule(torch.tensor(0.0), torch.tensor(4.0))) == 2
    assert hook(centers="epoch").supervision.generator.once_an_epoch
    assert made.generator.exclude_zero is False
    assert made.heads["text"].layer_1.out_features == 7
    assert made.heads["text"].dropout.p == 0.4
    assert hook().supervision.generator.label_range == 3.0


def test_the_order_of_the_hooks_tasks_means_nothing() -> None:
    assert list(hook(tasks="MTA").supervision.heads) == list(hook(tasks="AMT").supervision.heads) == ["audio", "text"]
    assert list(hook(tasks="MT").supervision.heads) == ["text"]
