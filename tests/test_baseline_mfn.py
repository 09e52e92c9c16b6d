"""EF-LSTM, MFN, Graph-MFN and MFM: the models that read text, audio and vision step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from easydict import EasyDict
from MMSA.models.singleTask.MFM import loss_MMD
from MMSA.models.subNets import AlignSubNet
from pydantic import create_model
from torch.nn.functional import batch_norm, mse_loss

from baselines_compat import ef_lstm, graph_mfn, mfm, mfn
from baselines_compat.layers import at_end, fold, on_text_steps, real_steps
from registry.errors import InputError
from registry.testing import check_model
from registry.training import make_optimizer
from tests.baselines import (
    ALIGNED,
    DIMS,
    LENGTHS,
    as_upstream,
    batch,
    configured,
    enlarge,
    fine_tuned,
    give_weights,
    info,
    upstream,
)  # fmt: skip

MODALITIES = {"text": "l", "audio": "a", "vision": "v"}
MEMORY = {
    "hidden_dims": (8, 4, 6),
    "memsize": 5,
    "gamma1Config": {"drop": 0.3, "shapes": 7},
    "gamma2Config": {"drop": 0.2, "shapes": 9},
    "outConfig": {"drop": 0.5, "shapes": 11},
}
OF_MFN = {"windowsize": 2, "NN1Config": {"drop": 0.1, "shapes": 10}, "NN2Config": {"drop": 0.4, "shapes": 3}}
OF_MFM = {
    **{"zy_size": 5, "zl_size": 6, "za_size": 7, "zv_size": 8, "fy_size": 4, "fl_size": 3, "fa_size": 2, "fv_size": 5},
    **{"zy_to_fy_dropout": 0.1, "zl_to_fl_dropout": 0.2, "za_to_fa_dropout": 0.3, "zv_to_fv_dropout": 0.4},
    **{"fy_to_y_dropout": 0.5, "lda_mmd": 100, "lda_xl": 0.5, "lda_xa": 0.01, "lda_xv": 0.7},
}
SIZES = {
    "ef_lstm": {"hidden_dims": 6, "num_layers": 2, "dropout": 0.3},
    "mfn": {**MEMORY, **OF_MFN},
    "graph_mfn": {**MEMORY, "inner_node_dim": 6, "NNConfig": {"drop": 0.4, "shapes": 3}},
    "mfm": {**MEMORY, **OF_MFN, **OF_MFM},
}
SPECS = {module.SPEC.name: module.SPEC for module in (ef_lstm, mfn, graph_mfn, mfm)}
NAMES = list(SPECS)


def lstm(ours, theirs, layer=""):
    """Return the names of an LSTM's weights, of `nn.LSTM` with the suffix of its layer."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {f"{ours}.{kind}{layer}": f"{theirs}.{kind}" for kind in kinds}


def network(ours, theirs):
    return {f"{ours}.layer_{n}": f"{theirs}fc{n}" for n in (1, 2)}


def memory(prefix=""):
    """Return the names of `GatedMemory`, and of the head."""
    parts = {"propose": "att2_", "keep": "gamma1_", "take": "gamma2_"}
    return {k: v for ours, theirs in parts.items() for k, v in network(f"memory.{ours}", prefix + theirs).items()}


def fusion(prefix=""):
    """Return the names of `MemoryFusion`."""
    names = {**memory(prefix), **network("attention", f"{prefix}att1_")}
    for name, letter in MODALITIES.items():
        names |= lstm(f"rnn.{name}", f"{prefix}lstm_{letter}")
    return {f"fusion.{ours}": theirs for ours, theirs in names.items()}


def names_of(name):
    """Return our names of the weights and upstream's, and those that upstream has and does not read."""
    if name == "ef_lstm":
        return {"norm": "norm", "rnn": "lstm", "layer_1": "linear", "layer_2": "out"}, ()
    if name == "mfn":
        return {**fusion(), **network("head", "out_")}, ()
    if name == "graph_mfn":
        names = {**memory(), **network("head", "out_"), "graph.nodes.all": "graph_mfn.t_network"}
        names |= {f"graph.nodes.{ours}": f"graph_mfn.{theirs}" for ours, theirs in NODES.items()}
        for name, letter in MODALITIES.items():
            names |= lstm(f"rnn.{name}", f"lstm_{letter}", "_l0") | {f"transform.{name}": f"{letter}_transform"}
        theirs = {"graph.efficacy.0": "0", "graph.efficacy.1": "1.0", "graph.efficacy.2": "2"}
        names |= {ours: f"graph_mfn.efficacy_model.{place}" for ours, place in theirs.items()}
        for node in [name for name in names if name.startswith("graph.nodes")]:
            place = names.pop(node)
            names |= {f"{node}.0": f"{place}.0", f"{node}.1": f"{place}.1.0"}
        return names, ()
    names = {**fusion("mfn_encoder."), "code": "last_to_zy_fc1"}
    names |= network("factor", "zy_to_fy_") | network("head", "fy_to_y_")
    for name, letter in MODALITIES.items():
        names |= lstm(f"encoders.{name}.rnn", f"encoder_{letter}.lstm", "_l0")
        names |= {f"encoders.{name}.linear": f"encoder_{letter}.fc1", f"decoders.{name}.rnn": f"decoder_{letter}.lstm"}
        names |= {f"decoders.{name}.linear": f"decoder_{letter}.fc1"}
        names |= network(f"factors.{name}", f"z{letter}_to_f{letter}_")
    return names, ("mfn_encoder.out_",)


NODES = {"text_audio": "node_01", "text_vision": "node_02", "audio_vision": "node_12", "text_audio_vision": "node_012"}


def pair(name, preset, lengths=LENGTHS, **changes):
    """Return upstream's model, and ours with its weights."""
    sizes = SIZES[name] | changes
    theirs = upstream(name, lengths, need_model_aligned=True, **sizes)
    if name == "graph_mfn":  # its own dict of networks is not part of the module
        for key, node in theirs.Model.graph_mfn.networks.items():
            theirs.Model.graph_mfn.add_module("node_" + "".join(map(str, key)), node)
        enlarge(theirs.Model)
    ours = SPECS[name].build(configured(SPECS[name], preset, **sizes), info(lengths)).eval()
    if not (name == "ef_lstm" and preset == "corrected"):  # its normalisation has other shapes
        names, unused = names_of(name)
        give_weights(ours, theirs.Model, names, unused)
    return ours, theirs


def averaged(data):
    """Return what upstream's loader makes of a batch for MFN: audio and vision (B, 1, d)."""
    return replace(data, audio=data.audio.mean(1, keepdim=True), vision=data.vision.mean(1, keepdim=True))


def predictions(theirs, data):
    output = theirs(data.text, data.audio, data.vision)
    return (output["M"] if isinstance(output, dict) else output[0]).flatten()


def same(ours, theirs, limit=1e-5):
    torch.testing.assert_close(ours, theirs, atol=limit, rtol=limit)


@pytest.mark.parametrize("lengths", [LENGTHS, ALIGNED], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_upstream(name, lengths):
    ours, theirs = pair(name, "mmsa", lengths)
    data = batch(lengths)
    same(ours(data).prediction, predictions(theirs, averaged(data) if name == "mfn" else data))


@pytest.mark.parametrize("name", ["mfn", "graph_mfn", "mfm"])
def test_corrected_equals_upstream_on_aligned_clips_without_padding(name):
    ours, theirs = pair(name, "corrected", ALIGNED)
    data = batch(ALIGNED, full=True)
    same(ours(data).prediction, predictions(theirs, data))


@pytest.mark.parametrize("name", ["mfn", "graph_mfn", "mfm"])
def test_gradients_equal_upstream(name):
    ours, theirs = pair(name, "corrected", ALIGNED)
    data = batch(ALIGNED, full=True)
    ours(data).prediction.square().sum().backward()
    predictions(theirs, data).square().sum().backward()
    gradients = {key: tensor.grad for key, tensor in theirs.Model.named_parameters()}
    names, _ = names_of(name)
    compared = 0
    for key, parameter in ours.named_parameters():
        prefix = max((p for p in names if key == p or key.startswith(f"{p}.")), key=len)
        foreign = gradients[names[prefix] + key[len(prefix) :]]
        if foreign is not None:
            same(parameter.grad, foreign, 1e-4)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", ["mfn", "graph_mfn", "mfm"])
def test_features_are_upstream_s_hidden_vectors(name):
    ours, theirs = pair(name, "corrected", ALIGNED)
    data, seen = batch(ALIGNED, full=True), {}
    fused = "fy_to_y_fc1" if name == "mfm" else "out_fc1"
    for letter in MODALITIES.values():
        place = f"encoder_{letter}.fc1" if name == "mfm" else f"lstm_{letter}"
        encoder = theirs.Model.get_submodule(place)
        encoder.register_forward_hook(lambda _m, _i, made, key=letter: seen.update({key: made}))
    getattr(theirs.Model, fused).register_forward_hook(lambda _m, _i, made: seen.update(fusion=made.clone()))
    predictions(theirs, data)
    found = ours(data).features
    assert set(found) == {*MODALITIES, "fusion"}
    for modality, letter in MODALITIES.items():
        same(found[modality], seen[letter] if name == "mfm" else seen[letter][0])
    same(found["fusion"], seen["fusion"].relu())


@pytest.mark.parametrize(("preset", "full"), [("mmsa", False), ("corrected", True)])
def test_losses_of_mfm_equal_upstream(preset, full):
    no_dropout = {key: 0.0 for key in OF_MFM if key.endswith("dropout")}
    no_dropout |= {key: {**SIZES["mfm"][key], "drop": 0.0} for key in SIZES["mfm"] if key.endswith("Config")}
    ours, theirs = pair("mfm", preset, ALIGNED, **no_dropout)
    data = batch(ALIGNED, full=full)
    torch.manual_seed(3)
    _, reconstruction, mmd, missing = theirs(data.text, data.audio, data.vision)
    torch.manual_seed(3)
    losses = ours.train()(data).losses
    assert missing == 0.0
    same(losses["mmd"], 100 * mmd)
    same(sum(losses[f"{modality}_reconstruction"] for modality in MODALITIES), reconstruction)


def test_the_distance_from_normal_equals_upstream_s():
    codes = 2 * torch.randn(30, 4)
    torch.manual_seed(5)
    theirs = loss_MMD(codes, EasyDict(device="cpu"))
    torch.manual_seed(5)
    same(mfm.distance_from_normal(codes), theirs, 1e-6)
    assert mfm.distance_from_normal(torch.zeros(1, 4)).isfinite()


def small(spec):
    """Return a spec whose default is small, so that checks are quick."""
    fields = {key: (spec.config.model_fields[key].annotation, value) for key, value in SIZES[spec.name].items()}
    return replace(spec, config=create_model("small", __base__=spec.config, **fields), presets={})


@pytest.mark.parametrize("change", [lambda spec: spec, fine_tuned, as_upstream], ids=["frozen", "tuned", "as_upstream"])
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract(name, change):
    check_model(change(small(SPECS[name])))


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_read(name):
    for preset, agrees in (("corrected", True), ("mmsa", False)):
        model = SPECS[name].build(configured(SPECS[name], preset, **SIZES[name]), info(ALIGNED)).eval()
        torch.manual_seed(0)
        enlarge(model)
        data = batch(ALIGNED)
        real = real_steps(data.text_lengths, 9)[:, :, None]
        filled = {key: torch.where(real, getattr(data, key), 5.0) for key in MODALITIES}
        found = torch.allclose(model(data).prediction, model(replace(data, **filled)).prediction, atol=1e-5)
        assert found == agrees


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clips", [1, 4])
def test_a_step_moves_every_parameter(name, clips):
    spec = SPECS[name]
    config = configured(spec, **SIZES[name])
    model = spec.build(config, info()).train()
    torch.manual_seed(0)
    enlarge(model)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, [], config)
    for seed in range(8):  # a ReLU may be off, and dropout may drop, in one draw
        output = model(batch(seed=seed, clips=clips))
        (output.prediction.square().sum() + sum(output.losses.values())).backward()
    optimizer.step()
    still = [key for key, parameter in model.named_parameters() if torch.equal(before[key], parameter)]
    assert still == []
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# --- what is right here and wrong upstream


def test_the_nodes_of_the_graph_are_trained():
    spec = graph_mfn.SPEC
    trained = spec.build(configured(spec, **SIZES["graph_mfn"]), info())
    frozen = spec.build(configured(spec, "mmsa", **SIZES["graph_mfn"]), info())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    still = {name.rsplit(".", 2)[0] for name, parameter in frozen.named_parameters() if not parameter.requires_grad}
    assert still == {f"graph.nodes.{name}" for name in NODES}
    theirs = upstream("graph_mfn", ALIGNED, **SIZES["graph_mfn"])  # its optimiser sees what `parameters` gives
    known = {id(parameter) for parameter in theirs.parameters()}
    nodes = theirs.Model.graph_mfn.networks.values()
    assert not any(id(parameter) in known for node in nodes for parameter in node.parameters())


@pytest.mark.parametrize(("preset", "rate"), [("corrected", 0.002), ("mmsa", 0.001)])
def test_mfm_learns_at_the_published_rate(preset, rate):
    config = configured(mfm.SPEC, preset)
    assert config.learning_rate == rate
    model = mfm.SPEC.build(config, info())
    assert [group["lr"] for group in make_optimizer(model, [], config).param_groups] == [rate]


def test_mfm_reconstructs_real_steps_only():
    data = batch(ALIGNED)
    made = torch.randn(len(data), 9, DIMS["text"])
    rows = [(made[i, :n], data.text[i, :n]) for i, n in enumerate(data.text_lengths)]
    expected = mse_loss(torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows]))
    same(mfm.reconstruction_error(made, data.text, data.text_lengths), expected)
    same(mfm.reconstruction_error(made, data.text, None), mse_loss(made, data.text))


def test_padding_does_not_enter_the_losses_of_mfm():
    data = batch(ALIGNED)
    real = real_steps(data.text_lengths, 9)[:, :, None]
    filled = replace(data, **{key: torch.where(real, getattr(data, key), 5.0) for key in MODALITIES})
    for preset, agrees in (("corrected", True), ("mmsa", False)):
        model = mfm.SPEC.build(configured(mfm.SPEC, preset, **SIZES["mfm"]), info(ALIGNED)).train()
        losses = []
        for given in (data, filled):
            torch.manual_seed(0)
            losses.append(torch.stack(list(model(given).losses.values())))
        assert torch.allclose(*losses, atol=1e-5) == agrees


def test_a_reconstruction_does_not_move_the_text_it_is_of():
    model = mfm.SPEC.build(configured(mfm.SPEC, **SIZES["mfm"]), info()).train()
    with torch.no_grad():  # the text is only what is to be reconstructed
        model.encoders["text"].rnn.weight_ih_l0.zero_()
        model.fusion.rnn["text"].weight_ih.zero_()
    data = batch()
    text = data.text.clone().requires_grad_()
    model(replace(data, text=text)).losses["text_reconstruction"].backward()
    assert not text.grad.any()


def test_mfn_reads_audio_and_vision_as_sequences():
    data = batch(full=True)
    turned = replace(data, audio=data.audio.flip(1), vision=data.vision.flip(1))
    for preset, agrees in (("corrected", False), ("mmsa", True)):
        model = mfn.SPEC.build(configured(mfn.SPEC, preset, **SIZES["mfn"]), info()).eval()
        assert torch.allclose(model(data).prediction, model(turned).prediction, atol=1e-6) == agrees


def test_ef_lstm_normalises_each_feature_over_real_steps():
    lengths, norm = torch.tensor([3, 1, 4]), ef_lstm.NormaliseSteps(2)
    enlarge(norm)
    sequence = 3 + torch.tensor([1.0, 100.0]) * torch.randn(3, 4, 2)
    real = real_steps(lengths, 4)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    expected = batch_norm(sequence[real], mean, variance, norm.weight, norm.bias, training=True)
    same(norm.train()(sequence, lengths)[real], expected)
    same(norm.running_mean, mean)
    same(norm.running_var, variance)
    expected = batch_norm(sequence[real], mean, variance, norm.weight, norm.bias)
    same(norm.eval()(sequence, lengths)[real], expected)


def test_ef_lstm_does_not_drown_small_features():
    data = batch(ALIGNED, full=True)
    large = replace(data, audio=1000 * data.audio)
    for preset, agrees in (("corrected", True), ("mmsa", False)):
        model = ef_lstm.SPEC.build(configured(ef_lstm.SPEC, preset, **SIZES["ef_lstm"]), info(ALIGNED))
        enlarge(model)
        found = []
        for given in (data, large):
            model.train()
            torch.manual_seed(0)
            found.append(model(given).prediction)
        assert torch.allclose(*found, atol=1e-3) == agrees


def test_alignment_is_by_real_steps():
    data = batch()
    text, lengths = data.text, data.text_lengths
    sequences, real = on_text_steps(data, text, lengths, as_upstream=False)
    assert real.tolist() == lengths.tolist()
    for i, n in enumerate(lengths):  # the mean over a clip's first step of text, and nothing behind the last
        first = data.audio[i, : -(-int(data.audio_lengths[i]) // int(n))].mean(0)
        same(sequences["audio"][i, 0], first)
        assert not sequences["vision"][i, n:].any()
    empty = torch.zeros_like(lengths)
    sequences, real = on_text_steps(data, text, empty, as_upstream=False)
    assert real.tolist() == [1] * len(lengths)
    assert all(values.isfinite().all() for values in sequences.values())


@pytest.mark.parametrize("steps", [1, 4, 9, 18, 20])
def test_folding_equals_upstream(steps):
    theirs = AlignSubNet(EasyDict(feature_dims=[16, 5, 7], seq_lens=[9, steps, 3]), "avg_pool")
    sequence = torch.randn(2, steps, 5)
    same(fold(sequence, 9), theirs(torch.zeros(2, 9, 16), sequence, torch.zeros(2, 3, 7))[1])


def test_a_state_at_the_end():
    states = torch.arange(6.0).reshape(2, 3, 1)
    assert at_end(states, torch.tensor([2, 3])).flatten().tolist() == [1.0, 5.0]
    assert at_end(states, None).flatten().tolist() == [2.0, 5.0]


def test_windows_join_steps_with_those_before():
    states = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    assert mfn.windows(states, 2).tolist() == [[[0, 0, 1, 10], [1, 10, 2, 20], [2, 20, 3, 30]]]
    assert mfn.windows(states[:, :1], 3).tolist() == [[[0, 0, 0, 0, 1, 10]]]


def test_sizes_of_a_network_are_checked():
    assert configured(mfn.SPEC, **{"NN1Config.drop": 0.3}).NN1Config == {"drop": 0.3, "shapes": 32}
    for key, value in (("drop", 1), ("drop", "a"), ("shapes", 0), ("shapes", 2.5), ("shapes", True), ("width", 3)):
        with pytest.raises(InputError, match="'NN1Config' must have drop, a number"):
            configured(mfn.SPEC, **{f"NN1Config.{key}": value})


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_figures_of_mosi(name):
    config = configured(SPECS[name], "corrected")
    default = configured(replace(SPECS[name], presets={}))
    assert config.model_dump() == default.model_dump()
    assert not config.as_upstream
    assert configured(SPECS[name], "mmsa").as_upstream
