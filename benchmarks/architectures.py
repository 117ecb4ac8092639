"""Every causal language model of the installed transformers, small and with random weights: which rule captures what.

    python -m benchmarks.architectures

Truth is a loop over single examples that knows nothing of the package's capture: the model's ordinary forward pass,
autograd, Eq. 1 in plain torch. What cannot be built at this size is listed with its reason.
"""

from __future__ import annotations

import argparse
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.common import write_result
from montessori import AdamWState, InfluenceEstimator, reference
from montessori.errors import MontessoriError

VOCABULARY = 61
# What a config is given of these, under whatever names its architecture has for them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "mamba_d_head"), 8),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "rotary_dim"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "bos_token_id"), 1),
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mlp_only_layers": [],
}
# What single architectures need besides, mostly both kinds of layer that they mix.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {"hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0, "laurel_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 8},
    "jamba": {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_conv": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 8, "n_groups": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "attention_hidden_size": 32,
        "attention_head_dim": 8,
        "mamba_headdim": 8,
        "adapter_rank": 4,
    },
}
# Changes for architectures that do not take all of it, one after the other; None leaves a setting out.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    # Hybrids have their first layer of full attention at the end of a group.
    {"num_hidden_layers": 4},
    *({name: None} for name in ("head_dim", "num_key_value_heads", "sliding_window", "intermediate_size", "n_inner")),
)
MOST_PARAMETERS = 3_000_000
SECONDS = 60
# Float32, two orders of summation in a model of two layers; norms in Gemma 2's style are the roughest.
EXACT = 1e-3


class UnbuiltError(Exception):
    """An architecture that does not come small; the text says why."""


def build(name: str) -> nn.Module:
    """A model of a few narrow layers, all its vectors away from their initial values."""
    kind = CONFIG_MAPPING[name]
    try:
        own = kind().to_dict()
    # Some have no default that they take themselves.
    except Exception as error:
        raise unbuilt(error) from error
    values = {key: value for key, value in (SMALL | OWN.get(name, {})).items() if key in own}
    for change in CHANGES:
        values = {key: value for key, value in (values | change).items() if key in own and value is not None}
        torch.manual_seed(0)
        try:
            config = kind(**values).get_text_config()
            config.is_decoder, config.use_cache = True, False
            model = as_small(partial(transformers.AutoModelForCausalLM.from_config, config), MOST_PARAMETERS)
        except UnbuiltError:
            raise
        # Whatever an architecture raises at sizes that it was not made for.
        except Exception as error:
            reason = error
            continue
        return moved(model)
    raise unbuilt(reason)


def moved(model: nn.Module) -> nn.Module:
    """The model with all its vectors away from their initial values, and without gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.zero_grad()
    return model


def as_small(make: Callable[[], nn.Module], most: int) -> nn.Module:
    """The model that `make` makes, where it has no more than so many parameters and takes text."""
    with torch.device("meta"):
        size = sum(p.numel() for p in make().parameters())
    if size > most:
        raise UnbuiltError(f"{size / 1e6:.0f} M parameters")
    model = make().eval()
    plain_loss(model, rows(1, seed=0)[0]).backward()
    return model


def unbuilt(error: Exception) -> UnbuiltError:
    return UnbuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    # Token 0 is padding, which some architectures look for in the text.
    texts = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": text, "labels": [-100, *text[1:]]} for text in texts]


def plain_loss(model: nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    ids = torch.tensor([row["input_ids"]])
    return F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of what the loss depends on; a step of the optimizer passes over the rest."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True)
    return {name: grad for name, grad in found if grad is not None}


def slow_influence(model: nn.Module, optimizer: torch.optim.Optimizer, candidates: list, references: list) -> list:
    """Eq. 3 by one backward pass for each example."""
    state, named = AdamWState.from_optimizer(model, optimizer), dict(model.named_parameters())
    q = gradients(model, torch.stack([plain_loss(model, row) for row in references]).mean())
    found = []
    for row in candidates:
        total = 0.0
        for name, grad in gradients(model, plain_loss(model, row)).items():
            entry = state[name]
            step = reference.delta(grad, entry.exp_avg, entry.exp_avg_sq, named[name].detach(), entry.step)
            total += float((q[name].double() * step.double()).sum()) if name in q else 0.0
        found.append(-total)
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A limit in seconds of this process's own time, whatever else the machine does."""

    def stop(*_: object) -> None:
        raise UnbuiltError(f"more than {seconds} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def check(name: str, build: Callable[[str], nn.Module] = build) -> dict[str, Any]:
    """How `name` is captured and how far its scores are from the loop's, over the largest of them."""
    try:
        with at_most(SECONDS):
            model = build(name)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
            for row in rows(4, seed=99):
                optimizer.zero_grad()
                plain_loss(model, row).backward()
                optimizer.step()
            candidates, references = rows(6, seed=1), rows(3, seed=2)
            estimator = InfluenceEstimator(model, optimizer, references, method="first_order")
            found = estimator.score(candidates).influence
            want = np.array(slow_influence(model, optimizer, candidates, references))
    except UnbuiltError as error:
        return {"unbuilt": str(error)}
    except MontessoriError as error:
        return {"refused": str(error)}
    coverage = {rule: int(count) for rule, count in estimator.coverage.items()}
    return {"coverage": coverage, "error": float(np.abs(found - want).max() / np.abs(want).max())}


def main() -> None:
    run(__doc__, "architectures", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), check)


def run(about: str, result: str, names: Sequence[str], check: Callable[[str], dict[str, Any]]) -> None:
    """`check` each of the names, or those that the command line names, and write the result."""
    options = argparse.ArgumentParser(description=about.splitlines()[0])
    options.add_argument("--only", nargs="+", metavar="NAME", help="these alone, without writing the result")
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = {name: check(name) for name in tqdm(arguments.only or names)}
    wrong = {name: one["error"] for name, one in found.items() if not one.get("error", 0.0) <= EXACT}
    print(f"{sum('error' in one for one in found.values())} of {len(found)} scored; wrong: {wrong or 'none'}")
    if arguments.only:
        print(*(f"{name}: {one}" for name, one in found.items()), sep="\n")
    else:
        print(f"wrote {write_result(result, arguments, {'architectures': found})}")


if __name__ == "__main__":
    main()
