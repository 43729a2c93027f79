"""The benchmark of whole models, at tiny sizes on the CPU: what it writes, and that the variants agree."""

from __future__ import annotations

import contextlib
import csv

import pytest

pytest.importorskip("transformers", reason="pip install 'gemma-norm[example]' has transformers")

from gemma_norm.benchmark import model, model_run, model_shapes

TINY = ["--layers", "4", "--batch", "2", "--rounds", "1", "--steps", "1", "--device", "cpu"]


@pytest.mark.parametrize("shape", ["qwen3_5-tiny", "gemma3-tiny"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_run_writes_a_row_for_each_variant_and_their_logits_agree(tmp_path, capsys, shape, phase):
    path = tmp_path / "model.csv"
    variants = "original,ours,ours+gated,ours+residual,ours+rotation"
    assert model.main(["--shape", shape, "--phase", phase, "--variant", variants, "--csv", str(path), *TINY]) == 0
    lines = path.read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["variant"] for row in rows] == variants.split(",")
    assert any(line.startswith("# transformers: ") for line in lines)
    for row in rows:
        assert (row["shape"], row["phase"], row["mode"], row["batch"]) == (shape, phase, "eager", "2")
        assert float(row["ms_a_step"]) > 0 and float(row["tokens_per_s"]) > 0
        # Gemma's and Qwen3.5's norms round once, as ours do: what differs is a last place here and there.
        assert float(row["logits_off"]) < 0.05
    assert float(rows[0]["times_original"]) == 1.0
    assert f"{shape}, 4 layers, {phase}, eager, batch 2" in capsys.readouterr().out


def test_a_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    path = tmp_path / "model.png"
    assert model.main(["--shape", "gemma3-tiny", "--variant", "original,ours", "--plot", str(path), *TINY]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_variants_share_their_weights_and_change_nothing_else():
    original = model_shapes.SHAPES["qwen3_5-tiny"].build(4, "cpu", model.torch.bfloat16)
    before = [type(module) for module in original.modules()]
    ours = model_shapes.variant_of(original, "ours+residual")
    assert [type(module) for module in original.modules()] == before
    assert [p.data_ptr() for p in ours.parameters()] == [p.data_ptr() for p in original.parameters()]
    assert len(model_shapes.norms(original)) > 8 and not model_shapes.norms(ours)


def test_a_variant_that_fails_is_reported_in_its_row(monkeypatch, tmp_path, capsys):
    def broken(module):
        module.forward = None

    monkeypatch.setitem(model_shapes.VARIANTS, "ours", broken)
    path = tmp_path / "model.csv"
    run = ["--shape", "gemma3-tiny", "--variant", "original,ours", "--csv", str(path), *TINY]
    assert model.main(run) == 1
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert not rows[0]["note"] and "TypeError" in rows[1]["note"] and float(rows[1]["ms_a_step"]) == 0
    assert "ours: TypeError" in capsys.readouterr().out


def test_a_variant_without_its_package_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(model, "absent", lambda name: "No module named 'liger_kernel'" if name == "liger" else "")
    assert model.main(["--shape", "gemma3-tiny", "--variant", "original,liger", *TINY]) == 0
    out = capsys.readouterr().out
    assert "liger is left out: No module named 'liger_kernel'" in out


@pytest.fixture
def tiny():
    return model_shapes.SHAPES["gemma3-tiny"].build(2, "cpu", model.torch.bfloat16)


def test_a_compiled_step_finds_room_in_its_cache_in_every_sample(monkeypatch, tiny):
    monkeypatch.setattr(model.torch, "compile", lambda module, dynamic: module)
    setting = model_run.Setting("gemma3-tiny", 2, "decode", "compile", 2, "cpu")
    step = model_run.Step(tiny, setting)
    for _ in range(2 * model_run.PROMPT):  # twice the room
        model_run._sample(step, 1)
    lengths = {int(layer.cumulative_length) for layer in step.cache.layers}
    assert lengths == {model_run.PROMPT + 1}


def test_a_graph_is_captured_after_the_prompt_is_computed(monkeypatch, tiny):
    """On a GPU the warm-up has a stream of its own, which once read the token before it was written."""
    done = []

    class Stream:
        def wait_stream(self, other):
            done.append(f"wait for {other}")

    class Cuda:
        CUDAGraph = object
        current_stream = staticmethod(lambda: "current")
        stream = graph = staticmethod(lambda _: contextlib.nullcontext())
        synchronize = staticmethod(lambda: done.append("synchronize"))

    Cuda.Stream = Stream
    monkeypatch.setattr(model_run, "cuda", Cuda)
    eager = model_run.Step._eager
    monkeypatch.setattr(model_run.Step, "_eager", lambda self: (done.append("step"), eager(self))[1])
    model_run.Step(tiny, model_run.Setting("gemma3-tiny", 2, "decode", "graph", 2, "cpu"))
    assert done == ["wait for current", "step", "step", "synchronize", "step"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--shape", "gemma4", "unknown name 'gemma4': choose from qwen3_5-4b"),
        ("--batch", "0", "expected whole numbers from 1 on with commas between them, got '0'"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(capsys, option, value, said):
    with pytest.raises(SystemExit):
        model.main([option, value])
    assert f"argument {option}: {said}" in capsys.readouterr().err
