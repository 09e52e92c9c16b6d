"""The registered datasets: facts of CMU-MOSI, CMU-MOSEI, CH-SIMS and CH-SIMS v2 as the upstream READMEs print them."""

from __future__ import annotations

from registry.contract import DatasetSpec

from .demo import generate

_MMSA = "https://github.com/thuiar/MMSA, whose README links the folders in its section Datasets"

DEMO = DatasetSpec(
    name="demo",
    summary="generated English clips with known text, audio and vision labels; needs no file",
    label_range=3.0,
    metrics="mosi",
    text_encoder="minilm",
    presets_of="mosi",
    generate=generate,
    epochs=15,
    caption="synthetic: shows that the tool works, not which model is better",
)

MOSI = DatasetSpec(
    name="mosi",
    summary="CMU-MOSI: opinions in YouTube monologues",
    label_range=3.0,
    metrics="mosi",
    text_encoder="bert-base-uncased",
    splits={"train": 1284, "valid": 229, "test": 686},
    sha256={
        "unaligned_50.pkl": "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524",
        "aligned_50.pkl": "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9",
    },
    published_at=_MMSA,
)

MOSEI = DatasetSpec(
    name="mosei",
    summary="CMU-MOSEI: opinions and emotions in YouTube monologues",
    label_range=3.0,
    metrics="mosi",
    text_encoder="bert-base-uncased",
    splits={"train": 16326, "valid": 1871, "test": 4659},
    sha256={
        "unaligned_50.pkl": "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f",
        "aligned_50.pkl": "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791",
    },
    published_at=_MMSA,
)

SIMS = DatasetSpec(
    name="sims",
    summary="CH-SIMS: Chinese film and television clips with a label for each modality",
    label_range=1.0,
    metrics="sims",
    text_encoder="bert-base-chinese",
    splits={"train": 1368, "valid": 456, "test": 457},
    sha256={"unaligned_39.pkl": "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f"},
    published_at=_MMSA,
)

SIMSV2 = DatasetSpec(
    name="simsv2",
    summary="CH-SIMS v2, the supervised part: more Chinese clips with a label for each modality",
    label_range=1.0,  # upstream's Self-MM clamps to 3.0 here, although labels lie in ±1
    metrics="sims",
    text_encoder="bert-base-chinese",
    splits={"train": 2722, "valid": 647, "test": 1034},
    published_at="https://github.com/thuiar/ch-sims-v2, whose README links them",
)

CUSTOM = DatasetSpec(
    name="custom",
    summary="your own feature file; give --label-range and --text-encoder",
    label_range=None,
    presets_of="mosi",
)
