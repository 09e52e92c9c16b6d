"""The comparison of speed with upstream, on a few short clips: whether the script works, not how fast anything is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from registry.data.text import find_text_encoder
from selfmm_plugin.upstream import Translation, translate

pytest.importorskip("MMSA", reason="MMSA, which the script compares with, is not installed (extra `test`)")

from tests.speed import against_upstream, kernels, measure, same_losses, shapes

TINY = ("--tiny", "--device", "cpu", "--epochs", "2", "--our-epochs", "2")


def test_both_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, threads = tmp_path / "figures.json", torch.get_num_threads()
    against_upstream.main(["--shape", "mosi", *TINY, "--output", str(output)])
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    ours = report["ours"]["fp32"]
    assert len(report["upstream"]["train_seconds"]) == len(ours["train_seconds"]) == 2
    ratio = report["upstream"]["derived"]["train"] / ours["derived"]["train"]
    assert re.search(rf"^upstream / ours, training +{ratio:.2f}$", printed, re.MULTILINE)
    assert ours["profile"]["classes"]["matmul"]["ms"] > 0
    assert f"ULGM's own work: {report['ulgm_ms']:.3f} ms a step" in printed
    assert torch.get_num_threads() == threads


def test_nothing_is_timed_where_a_weight_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(state: Mapping[str, Tensor]) -> Translation:
        made = translate(state)
        made.network["fusion.layer_3.bias"] += 0.1
        return made

    monkeypatch.setattr(same_losses, "translate", wrong)
    monkeypatch.setattr(measure, "time_upstream", lambda *_: pytest.fail("upstream was timed"))
    with pytest.raises(SystemExit, match=r"^upstream and ours do not do the same work: .*; nothing was timed$") as end:
        against_upstream.main(["--shape", "mosei", *TINY])
    assert isinstance(end.value.code, str)  # which Python prints, and makes 1


@pytest.mark.parametrize("shape", shapes.SHAPES.values(), ids=shapes.SHAPES)
def test_a_shape_is_as_it_says(shape: shapes.Shape) -> None:
    clips = 500
    train = shapes.make_features(shape.of_sizes(train=clips))["train"]
    lengths = train["text_bert"][:, 1].sum(axis=1)
    assert (lengths.min() >= 3, lengths.max() <= shape.tokens) == (True, True)
    assert lengths.mean() == pytest.approx({"mosi": 15.4, "mosei": 25.0}[shape.dataset], abs=1.5)
    for modality in ("audio", "vision"):
        longest, width = getattr(shape, modality)
        assert train[modality].shape == (clips, longest, width)
        assert (min(train[f"{modality}_lengths"]) >= 1, max(train[f"{modality}_lengths"])) == (True, longest)
        assert np.corrcoef(train[f"{modality}_lengths"], lengths)[0, 1] > 0.8


def test_raw_text_has_the_ids_of_text_bert(tmp_path: Path) -> None:
    shape = shapes.tiny(shapes.SHAPES["mosi"])
    split = shapes.make_features(shape)["test"]
    encoder = find_text_encoder(str(shapes.write_encoder(shape, tmp_path / "encoder")))
    for ids, mask, text in zip(split["text_bert"][:, 0], split["text_bert"][:, 1], split["raw_text"], strict=True):
        assert encoder.tokenizer()(text)["input_ids"] == ids[mask == 1].tolist()


def test_operations() -> None:
    # One layer of width 4 and 10 parameters; clips of 2 and 3 tokens.
    assert shapes.operations(np.array([2, 3]), layers=1, width=4, parameters=10) == 6 * 10 * 5 + 12 * 4 * (4 + 9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nt_n_tilesize128x128x16_stage4", "matmul"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "Adam"),
        ("void RNN_blockPersist_fp_LSTM<float, float, float, 16>", "LSTM"),
        ("void at::native::elementwise_kernel<128, 4, at::native::bfloat16_copy_kernel_cuda>", "casts and copies"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "norms, dropout, elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norms, dropout, elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>", "reductions"),
        ("void at::native::index_elementwise_kernel<128, 4>", "index, scatter, sort"),
        ("aten::addmm", "matmul"),
        ("aten::view", "other"),
    ],
)
def test_kernels_have_a_class(name: str, kind: str) -> None:
    assert kernels.class_of(name) == kind


def test_a_profile_is_summed_by_class() -> None:
    spans = [("gemm", 0, 1000), ("gelu", 500, 1500), ("gemm", 3000, 4000)]
    found = kernels.summary([kernels.Event(name, start, end, end - start) for name, start, end in spans], 2, "cuda")
    assert found["classes"]["matmul"] == {"ms": 1.0, "count": 1.0}
    assert found["classes"]["norms, dropout, elementwise"] == {"ms": 0.5, "count": 0.5}
    assert found["busy"] == pytest.approx(2500 / 4000)
