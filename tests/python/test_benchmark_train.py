"""The training benchmark, at tiny sizes on the CPU: what it writes, and that the makes of norms train alike."""

from __future__ import annotations

import csv

import pytest
import torch

from gemma_norm.benchmark import train, train_model
from gemma_norm.benchmark.train_model import NORMS, Size, Text

SMALL = ["--hidden", "32", "--head", "16", "--batch", "2", "--length", "16"]
TINY = [*SMALL, "--rounds", "1", "--steps-a-sample", "1", "--device", "cpu"]
SIZE = Size(32, 4, 16, 2, 16)


def rows_of(path):
    lines = path.read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_a_run_compares_losses_and_times_a_step(tmp_path, capsys):
    table, losses = tmp_path / "train.csv", tmp_path / "losses.csv"
    variants = "eager,float64,F.rms_norm,ours"
    line = ["--variant", variants, "--steps", "30", "--seeds", "2", "--csv", str(table), "--losses", str(losses)]
    assert train.main([*line, *TINY]) == 0
    rows = {(row["what"], row["variant"]): row for row in rows_of(table)}
    assert [v for what, v in rows if what == "float32"] == variants.split(",")
    assert [v for what, v in rows if what == "bfloat16"] == ["eager", "F.rms_norm", "ours"]
    for (what, variant), row in rows.items():
        assert not row["note"]
        if what == "float32":  # the same weights and the same text: rounding alone differs
            assert float(row["largest_difference"]) < 1e-4, variant
        if what == "a step":
            assert float(row["ms_a_step"]) > 0 and float(row["times_eager"]) > 0
    assert float(rows["bfloat16", "ours"]["spread"]) > 0
    steps = rows_of(losses)
    assert len(steps) == 30 * (4 + 2 * 3)
    eager = [float(s["loss"]) for s in steps if (s["dtype"], s["variant"]) == ("float32", "eager")]
    assert eager[-1] < eager[0], "it learns"
    out = capsys.readouterr().out
    assert "losses in float32, 1 seeds" in out and "losses in bfloat16, 2 seeds" in out and "of eager" in out


@pytest.mark.parametrize("name", [name for name in NORMS if name != "liger"])
def test_every_make_has_the_same_loss_gradients_and_weights(name):
    tokens = Text(SIZE, 1).batch()
    models = [train_model.build(SIZE, NORMS[make], 3, "cpu", torch.float32) for make in ("eager", name)]
    parameters = [dict(model.named_parameters()) for model in models]
    assert parameters[0].keys() == parameters[1].keys()
    assert all(torch.equal(p, parameters[1][key]) for key, p in parameters[0].items())
    losses = [model(tokens) for model in models]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for key, p in parameters[0].items():
        assert p.grad.abs().max() > 0, key
        torch.testing.assert_close(parameters[1][key].grad, p.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_the_model_is_causal():
    tokens = Text(SIZE, 1).batch()
    model = train_model.build(SIZE, NORMS["ours"], 0, "cpu", torch.float32)
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(tokens)
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % train_model.VOCABULARY
    model(other)
    assert torch.equal(seen[0][:, :10], seen[1][:, :10]) and not torch.equal(seen[0][:, 10:], seen[1][:, 10:])


def test_the_text_is_the_same_for_a_seed():
    first, again, other = (Text(SIZE, seed).batch() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_variant_that_trains_otherwise_shows(monkeypatch, tmp_path, capsys):
    class Wrong(train_model.Norm):
        def norm(self, x):
            return super().norm(x) * 1.01

    monkeypatch.setitem(NORMS, "ours", Wrong)
    path = tmp_path / "t.csv"
    assert train.main(["--variant", "eager,ours", "--steps", "5", "--seeds", "1", "--csv", str(path), *TINY]) == 0
    assert float(rows_of(path)[1]["largest_difference"]) > 1e-4


def test_a_variant_that_fails_is_reported_in_its_row(monkeypatch, tmp_path, capsys):
    def broken(size, gated=False):
        raise ValueError("broken")

    monkeypatch.setitem(NORMS, "ours", broken)
    path = tmp_path / "t.csv"
    assert train.main(["--variant", "eager,ours", "--steps", "1", "--seeds", "1", "--csv", str(path), *TINY]) == 1
    assert ["broken" in row["note"] for row in rows_of(path)] == [False, True] * 3
    assert "ours: ValueError: broken" in capsys.readouterr().out


def test_liger_is_left_out_without_a_gpu_and_named(capsys):
    assert train.main(["--variant", "eager,liger", "--steps", "1", "--seeds", "1", *TINY]) == 0
    assert "liger is left out: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--variant", "apex", "unknown name 'apex': choose from eager"),
        ("--seeds", "0", "expected a whole number from 1 on, got '0'"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(capsys, option, value, said):
    with pytest.raises(SystemExit):
        train.main([option, value])
    assert f"argument {option}: {said}" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    path = tmp_path / "t.csv"
    line = ["--steps", "20", "--seeds", "2", *SMALL, "--step-hidden", "256", "--step-batch", "2", "--csv", str(path)]
    assert train.main([*line, "--variant", "eager,F.rms_norm,ours"]) == 0
    assert all(float(row["peak_mib"]) > 0 for row in rows_of(path) if row["what"] == "a step")
