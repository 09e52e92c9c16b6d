"""The dataset `demo`: generated English clips that know their true text, audio and vision sentiment.

It shows that the tool works, not which model is better. Sentiments lie in ±3.

- A sentence is made from a small lexicon; its text sentiment T is the strength of its words: an adverb scales an
  adjective, a negation turns it round at half strength, and a second clause counts as much as the first.
- Most clips agree: audio sentiment A and vision sentiment V are T plus N(0, 0.3). A share `conflict` does not. Half of
  these are irony (voice and face both contradict the words), in a quarter only the voice contradicts, in a quarter
  only the face.
- The multimodal label is M = 0.5 T + 0.25 A + 0.25 V, in irony 0.2 T + 0.4 A + 0.4 V, plus N(0, 0.15) of annotators.
- Audio and vision are sequences: a rising trajectory in a fixed direction, as strong as the sentiment, plus a
  speaker's offset and autoregressive noise.
- Labels are rounded to multiples of 0.2, as the mean of five annotators would be.
"""

from __future__ import annotations

import hashlib

import numpy as np

from .splits import FeatureFile, SplitArrays

SIZES = {"train": 640, "valid": 160, "test": 240}
RANGE = 3.0
_ADJECTIVES = {
    "brilliant": 2.4, "wonderful": 2.2, "amazing": 2.2, "excellent": 2.0, "beautiful": 1.8, "great": 1.6,
    "touching": 1.4, "clever": 1.4, "funny": 1.2, "charming": 1.2, "enjoyable": 1.0, "good": 1.0, "nice": 0.8,
    "decent": 0.6, "fine": 0.4, "ordinary": 0.0, "usual": 0.0, "short": 0.0, "simple": 0.0, "quiet": 0.0,
    "slow": -0.6, "flat": -0.8, "predictable": -0.8, "forgettable": -1.0, "weak": -1.0, "dull": -1.2, "boring": -1.4,
    "bad": -1.4, "annoying": -1.6, "messy": -1.2, "stupid": -1.8, "awful": -2.2, "terrible": -2.2, "horrible": -2.4,
}  # fmt: skip
_ADVERBS = {
    "": 1.0,
    "really": 1.25,
    "very": 1.25,
    "so": 1.25,
    "quite": 0.9,
    "rather": 0.8,
    "a bit": 0.5,
    "absolutely": 1.3,
}
_THINGS = [
    "movie", "film", "story", "plot", "acting", "soundtrack", "ending", "beginning", "script", "dialogue", "main actor",
    "main actress", "director's work", "camera work", "humor", "action", "sequel", "book", "phone", "camera", "screen",
    "restaurant", "food", "service", "hotel", "concert", "song", "game", "lecture", "trailer",
]  # fmt: skip
_VERBS = ["was", "is", "seemed", "felt", "turned out"]
_OPENERS = [
    "", "", "", "I think", "honestly", "to me", "you know", "in my opinion", "well", "I have to say", "as for me",
    "my friends say", "I would say", "to be honest", "so", "I guess",
]  # fmt: skip
_LINKS = ["and", "but", "while", "although"]
_CLOSERS = ["", "", "", "if you ask me", "for what it is", "this time", "all in all", "as far as I remember"]


def generate(conflict: float = 0.3, seed: int = 7) -> FeatureFile:
    """Return the dataset; the same arguments give the same bytes.

    Args:
        conflict: share of clips whose modalities disagree, 0…1.
        seed: of the generator.

    Returns:
        640 / 160 / 240 clips with `raw_text`, audio (N, 40, 12), vision (N, 30, 16) and labels M, T, A, V.
    """
    rng = np.random.default_rng(seed)
    directions = {"audio": rng.normal(size=12) / 12**0.5, "vision": rng.normal(size=16) / 16**0.5}
    splits = {name: _split(name, clips, conflict, directions, rng) for name, clips in SIZES.items()}
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update("\n".join(split.raw_text or []).encode())
        # Not of the features, whose last bits are another machine's own.
        for array in (*split.labels.values(), split.audio_lengths, split.vision_lengths):
            digest.update(np.round(np.asarray(array, dtype=np.float64) * 5).astype(np.int64).tobytes())
    note = (
        f"demo is synthetic (modalities disagree in {conflict:.0%} of it): "
        "it shows that the tool works, not which model is better"
    )
    return FeatureFile("demo", splits, aligned=False, sha256=digest.hexdigest(), notes=[note])


def _split(
    name: str, clips: int, conflict: float, directions: dict[str, np.ndarray], rng: np.random.Generator
) -> SplitArrays:
    sentences, strengths = zip(*(_sentence(rng) for _ in range(clips)), strict=True)
    text = np.array(strengths)
    kind = rng.choice(["agree", "irony", "voice", "face"], clips, p=[1 - conflict, *np.array([2, 1, 1]) / 4 * conflict])
    audio, vision = (text + rng.normal(0, 0.3, clips) for _ in range(2))
    # What contradicts is never lukewarm, else a conflict would be none.
    contrary = -np.where(text >= 0, 1, -1) * rng.uniform(1, 2.5, clips)
    audio = np.where(np.isin(kind, ["irony", "voice"]), contrary + rng.normal(0, 0.3, clips), audio)
    vision = np.where(np.isin(kind, ["irony", "face"]), contrary + rng.normal(0, 0.3, clips), vision)
    weights = np.where((kind == "irony")[:, None], [0.2, 0.4, 0.4], [0.5, 0.25, 0.25])
    multimodal = (weights * np.stack([text, audio, vision], 1)).sum(1) + rng.normal(0, 0.15, clips)
    audio_sequence, audio_lengths = _sequence(audio, 40, directions["audio"], rng)
    vision_sequence, vision_lengths = _sequence(vision, 30, directions["vision"], rng)
    labels = {"M": multimodal, "T": text, "A": audio, "V": vision}
    return SplitArrays(
        ids=[f"demo_{name}_{clip:04}" for clip in range(clips)],
        labels={task: _rounded(values) for task, values in labels.items()},
        raw_text=list(sentences),
        audio=audio_sequence,
        audio_lengths=audio_lengths,
        vision=vision_sequence,
        vision_lengths=vision_lengths,
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    return (np.round(values.clip(-RANGE, RANGE) * 5) / 5 + 0.0).astype(np.float32)


def _sentence(rng: np.random.Generator) -> tuple[str, float]:
    """Return a sentence and its sentiment."""
    wanted = rng.normal(0.2, 1.5)
    clauses = [_clause(wanted + rng.normal(0, 0.6), rng) for _ in range(1 if rng.random() < 0.45 else 2)]
    words = [
        rng.choice(_OPENERS),
        f" {rng.choice(_LINKS)} ".join(clause for clause, _ in clauses),
        rng.choice(_CLOSERS),
    ]
    strength = float(np.mean([strength for _, strength in clauses]))
    return " ".join(word for word in words if word), float(np.clip(strength, -RANGE, RANGE))


def _clause(wanted: float, rng: np.random.Generator) -> tuple[str, float]:
    """Return a clause about one thing whose sentiment is near the wanted one, and its sentiment."""
    adverb = rng.choice(list(_ADVERBS))
    negated = rng.random() < 0.2
    scale = (-0.5 if negated else 1.0) * _ADVERBS[adverb]
    distance = {word: abs(scale * strength - wanted) + rng.gumbel(0, 0.25) for word, strength in _ADJECTIVES.items()}
    adjective = min(distance, key=distance.__getitem__)
    verb = rng.choice(_VERBS)
    negation = {"was": "was not", "is": "is not", "seemed": "did not seem", "felt": "did not feel"}
    said = negation.get(verb, "did not turn out") if negated else verb
    words = ["the", rng.choice(_THINGS), said, adverb, adjective]
    return " ".join(word for word in words if word), scale * _ADJECTIVES[adjective]


def _sequence(
    sentiment: np.ndarray, longest: int, direction: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences (N, longest, d) that carry a sentiment (N), zero behind their lengths (N)."""
    clips, width = len(sentiment), len(direction)
    lengths = rng.integers(longest // 5, longest + 1, clips)
    noise = np.zeros((clips, longest, width))
    shocks = rng.normal(0, 0.6, noise.shape)
    for step in range(longest):
        noise[:, step] = 0.7 * noise[:, step - 1] * (step > 0) + shocks[:, step]
    rise = np.minimum((np.arange(longest) + 1) / (0.6 * lengths[:, None]), 1)
    signal = sentiment[:, None, None] * rise[:, :, None] * direction
    offset = rng.normal(0, 0.4, (clips, 1, width))
    real = np.arange(longest) < lengths[:, None]
    return ((signal + offset + noise) * real[:, :, None]).astype(np.float32), lengths
