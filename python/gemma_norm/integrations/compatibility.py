"""Every causal language model of the installed transformers, patched.

``python -m gemma_norm.integrations.compatibility`` writes a table of them.

Each family is built tiny, with random weights, and run as it is and patched, in float32 and bfloat16. The table goes to
the file that is named, or to the standard output. Each family has a process of its own, and a time limit.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import platform
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from .transformers import Report, patch, patched, unpatch

SIZES: dict[tuple[str, ...], Any] = {
    ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"): 128,
    ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "word_embed_proj_dim", "lru_width",
     "hidden_size_global"): 64,
    ("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"): 96,
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"): 4,
    ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "attention_num_kv_heads"): 2,
    ("head_dim", "attention_head_dim", "global_head_dim", "d_kv", "swa_head_dim", "linear_head_dim"): 16,
    ("max_position_embeddings", "n_positions", "max_seq_len"): 128,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_n_routed_experts"): 4,
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_per_token"): 2,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size",
     "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "moe_ffn_hidden_size"): 32,
    ("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "num_expert_group", "first_k_dense_replace"): 1,
    ("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "o_lora_rank"): 32,
    ("qk_rope_head_dim",): 8,
    ("qk_nope_head_dim", "v_head_dim"): 16,
    ("linear_num_key_heads",): 2,
    ("linear_num_value_heads", "mamba_num_heads", "index_n_heads"): 4,
    ("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "index_head_dim", "state_size", "ssm_state_size",
     "mamba_d_state"): 16,
    ("mamba_d_head", "mamba_headdim"): 16,
    ("mamba_n_heads", "n_mamba_heads"): 8,
    ("time_step_rank", "mamba_dt_rank"): 8,
    ("sliding_window", "attention_window", "attention_chunk_size", "chunk_size"): 16,
    ("pad_token_id",): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
}  # fmt: skip
# Where names do not suffice.
ALSO: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "bamba": {"mamba_n_groups": 1, "mamba_expand": 2},
    "falcon_h1": {"mamba_n_groups": 1, "mamba_d_ssm": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 1},
    "zamba2": {"mamba_ngroups": 1, "num_mem_blocks": 1, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"num_hidden_layers": 12},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 5, "intermediate_size": 96},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
}
SIZE_OF = {name: size for names, size in SIZES.items() for name in names}


def _import(name: str) -> Any:
    """transformers is not typed everywhere, and is not there when the types are checked."""
    return importlib.import_module(name)


def tiny(config_class: Any, family: str) -> Any:
    """A small configuration: what has a known name gets a small value, in the configurations inside it too."""
    default = config_class()
    options: dict[str, Any] = {}
    for name in {*default.to_dict(), *(getattr(default, "attribute_map", None) or {})}:
        try:
            value: Any = getattr(default, name, None)
        except Exception:  # such as an attribute that differs from layer to layer
            value = None
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            options[name] = tiny(type(value), value.model_type)
        elif name in SIZE_OF and (value is None or isinstance(value, int | list)) and not isinstance(value, bool):
            options[name] = [SIZE_OF[name]] * 4 if isinstance(value, list) else SIZE_OF[name]
    if "qk_rope_head_dim" in options and "num_key_value_heads" in options:  # keys and values of a latent, for each head
        options["num_key_value_heads"] = options["num_attention_heads"]
    if "qk_rope_head_dim" in options and "head_dim" in options:
        options["head_dim"] = options["qk_rope_head_dim"]  # the part that is rotated
    return config_class(**{**options, **ALSO.get(family, {})})


def build(config_class: Any, model_class: Any, family: str) -> nn.Module:
    torch.manual_seed(0)
    own = getattr(model_class, "config_class", None) or config_class  # the text part of a larger configuration
    config = tiny(own, own.model_type)
    config.use_cache = False
    model: nn.Module = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else every norm's weight is one, which two roundings cannot be told by
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
            elif not bool(parameter.isfinite().all()):
                nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def judge(config_class: Any, model_class: Any, family: str) -> dict[str, Any]:
    """What the table says of one family. Raises what building and running it raises."""
    model = build(config_class, model_class, family)
    plan = patch(model, dry_run=True)
    result: dict[str, Any] = {
        "norms": len(plan.replaced),
        "kinds": sorted({str(row.semantics) for row in plan.replaced}),
        "left": sorted({f"{row.cls}: {row.reason}" for row in plan.left}),
    }
    if not plan.replaced:
        return result
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        output: Tensor = model(input_ids=ids).logits
        return output

    wanted = {name: (t.data_ptr(), t.dtype, t.shape) for name, t in model.state_dict().items()}
    exact = logits()
    report = patch(model)
    single, state = logits(), {name: (t.data_ptr(), t.dtype, t.shape) for name, t in model.state_dict().items()}
    with patched(model, fuse_residual=True, fuse_rotation=True) as fused:
        joined = {"fused": len(fused.fused), "rotated": len(fused.rotated)}
        result |= {**joined, "fused_same": torch.equal(single, logits())}
    unpatch(model)
    result |= {
        "state": state == wanted,
        "float32": float((single - exact).abs().max() / exact.abs().max()),
        "restored": torch.equal(exact, logits()),
        "calls": _reasons(report),
    }
    try:
        model.bfloat16()
        original = logits().float()
        if not torch.equal(original, logits().float()):
            return {**result, "bfloat16": "the original differs from run to run"}
    except RuntimeError as error:
        return {**result, "bfloat16": f"the original fails: {str(error).splitlines()[0][:60]}"}
    with patched(model, fuse_residual=True, fuse_rotation=True):
        fused_half = logits()
    with patched(model) as report:
        half = logits()
    result["fused_same"] &= torch.equal(half, fused_half)
    result["restored"] &= torch.equal(original, logits().float())
    distance = [float((t.float() - exact).abs().mean()) for t in (half, original)]
    result |= {"equal": float((half.float() == original).float().mean()), "ratio": distance[0] / distance[1]}
    return {**result, "calls": sorted({*result["calls"], *_reasons(report)})}


def _reasons(report: Report) -> list[str]:
    return sorted({reason for _, reason in report.fallbacks})


def families() -> Iterator[tuple[str, Any, Any]]:
    auto = _import("transformers.models.auto.modeling_auto")
    for family in sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config_class = type(_import("transformers").AutoConfig.for_model(family))
            model_class = auto.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            yield family, config_class, model_class[0] if isinstance(model_class, tuple) else model_class
        except Exception as error:  # an optional package that is missing, for one
            yield family, None, error


def in_process(family: str, config_class: Any, model_class: Any, seconds: float) -> dict[str, Any]:
    context: Any = multiprocessing.get_context("fork")  # importing transformers takes longer than most families
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        try:
            sender.send(judge(config_class, model_class, family))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            lines = str(error).strip().splitlines() or [""]
            sender.send({"error": f"{type(error).__name__}: {lines[0][:90]}", "place": f"{place.name}:{place.lineno}"})

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv() if receiver.poll(seconds) else {"error": f"over {seconds:g} s"}
    except EOFError:
        result = {"error": "the process ended"}
    process.kill()
    process.join()
    return result


def passes(row: dict[str, Any]) -> bool:
    """float32 within 1e-5, the state untouched, unpatching and fusing exact, bfloat16 no farther from float32."""
    exact = row["state"] and row["restored"] and row["fused_same"]
    return bool(exact and row["float32"] <= 1e-5 and row.get("ratio", 1.0) <= 1.1)


def table(rows: dict[str, dict[str, Any]]) -> str:
    judged = {family: row for family, row in rows.items() if row.get("norms") and "float32" in row}
    none = sorted(family for family, row in rows.items() if row.get("norms") == 0)
    unknown = {family: row["error"] for family, row in rows.items() if "error" in row}
    half = [row for row in judged.values() if "equal" in row]
    equal = sum(row["equal"] == 1 for row in half)
    good = sum(passes(row) for row in judged.values())
    peer = _import("transformers").__version__
    versions = f"transformers {peer}, PyTorch {torch.__version__} and gemma_norm {__version__}, on a CPU"
    lines = [
        "# Compatibility with transformers",
        f"Written by `python -m gemma_norm.integrations.compatibility` with {versions} ({platform.machine()}). Every "
        "family of causal language models is built tiny, with random weights, and run on 2 x 12 tokens, as it is and "
        "after `gemma_norm.integrations.transformers.patch(model)`.",
        f"**{good} of {len(judged)} families with an RMSNorm keep every promise**: logits in float32 within 1e-5 of "
        "the largest, the same `state_dict` (keys and memory), the original's bits after `unpatch`, the same bits "
        "with `fuse_residual=True` and `fuse_rotation=True` as without, and bfloat16 logits no farther from the "
        f"float32 ones than 1.1 times the original's. In bfloat16 {equal} of {len(half)} have the original's bits. "
        "The others differ where another last place of float32 (the order of the sum, `1 / sqrt` beside `rsqrt`) tips "
        "a rounding, in a few elements, after which a model of many layers goes on with other bits.",
        "\n".join([_HEAD, *(_row(family, row) for family, row in sorted(judged.items()))]),
        _LEGEND,
        f"**No RMSNorm that is replaced** ({len(none)}): {', '.join(none)}.",
        f"**Not judged** ({len(unknown)}), as this script builds no tiny model of them, or the original does not run:",
        "\n".join(textwrap.shorten(f"- {family}: {error}", 118) for family, error in sorted(unknown.items())),
    ]
    lines = [line for line in lines if line]
    return "\n\n".join(line if line[0] in "|-" else textwrap.fill(line, 118) for line in lines) + "\n"


_HEAD = """| family | norms | what they compute | joined | float32 | bfloat16 equal | error | left |
|---|---|---|---|---|---|---|---|"""
_LEGEND = (
    "*norms*: how many are replaced. *What they compute*: `rounds twice` and `rounds each step` are "
    "`round_each_step` in [the contract](contract.md), `1 + weight` is `gemma`. *joined*: residual additions that "
    "`fuse_residual=True` joins with a norm, and with a plus sign rotations of q and k that `fuse_rotation=True` joins "
    "with their norms (in Qwen3-Next, Qwen3.5 and Qwen4 the gate beside q too). *float32*: the largest difference of "
    "the logits, over the largest logit. *error*: mean distance of the bfloat16 logits from the original's float32 "
    "ones, over the original's distance. *left*: what looks like a norm and stays as it is, and why; and why some "
    "calls of replaced norms ran the original forward."
)


def _row(family: str, row: dict[str, Any]) -> str:
    same = f"{100 * row['equal']:.4g} %" if "equal" in row else row.get("bfloat16", "")
    ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
    left = "<br>".join([*row["left"], *(f"some calls: {reason}" for reason in row["calls"])])
    name = family if passes(row) else f"**{family}: {_broken(row)}**"
    kinds = "<br>".join(row["kinds"])
    joined = f"{row['fused']}" + (f" + {row['rotated']}" if row["rotated"] else "")
    return f"| {name} | {row['norms']} | {kinds} | {joined} | {row['float32']:.1e} | {same} | {ratio} | {left} |"


def _broken(row: dict[str, Any]) -> str:
    broken = {name: row[name] for name in ("state", "restored", "fused_same") if not row[name]}
    broken |= {"float32": row["float32"]} if row["float32"] > 1e-5 else {}
    broken |= {"error": round(row["ratio"], 3)} if row.get("ratio", 1.0) > 1.1 else {}
    return ", ".join(f"{name} {value}" for name, value in broken.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="the table; default: the standard output")
    parser.add_argument("--only", nargs="*", default=[], help="families")
    parser.add_argument("--seconds", type=float, default=120.0, help="the limit for one family")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    _import("transformers").logging.set_verbosity_error()
    known = list(families())
    if unknown := sorted(set(options.only) - {family for family, *_ in known}):
        parser.error(f"argument --only: unknown family {unknown[0]!r}")
    rows = {}
    for family, config_class, model_class in known:
        if options.only and family not in options.only:
            continue
        if config_class is None:
            rows[family] = {"error": f"{type(model_class).__name__}: {str(model_class).splitlines()[0][:90]}"}
        else:
            rows[family] = in_process(family, config_class, model_class, options.seconds)
        print(family, rows[family], file=sys.stderr, flush=True)
    text = table(rows)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    judged = [row for row in rows.values() if "float32" in row]
    return 0 if judged and all(map(passes, judged)) else 1


if __name__ == "__main__":
    sys.exit(main())
