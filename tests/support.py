"""Small models, random examples and the slow truth that the tests compare with."""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from montessori import AdamWState, reference

VOCABULARY = 61

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
_LLAMA = {**_COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "llama_tied": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama_untied": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "llama_biases": lambda: transformers.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_head=4, n_layer=2, n_positions=64, **_TOKENS
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON, intermediate_size=24, max_position_embeddings=64),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, **_TOKENS,
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**_LLAMA, **_TOKENS),
    "mixtral": lambda: transformers.MixtralConfig(
        **_LLAMA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_LLAMA, head_dim=4, num_local_experts=5, num_experts_per_tok=2, sliding_window=8, **_TOKENS,
        experts_implementation="eager",
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_LLAMA, "num_key_value_heads": 4}, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, experts_implementation="eager",
    ),
    "falcon": lambda: transformers.FalconConfig(**_COMMON, bias=True, **_TOKENS),
}  # fmt: skip
# Linear attention, whose decays are float32 whatever the model's dtype.
RECURRENT = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, **_TOKENS
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **_LLAMA, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=4, linear_value_head_dim=4,
    ),
}  # fmt: skip


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, layers: int | None = None) -> nn.Module:
    """A small causal LM with random weights, every norm weight and bias away from its initial value."""
    torch.manual_seed(seed)
    lora = name == "llama_lora"
    config = (CONFIGS | RECURRENT)["llama_tied" if lora else name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if lora:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).to(dtype)
    return model.eval()


def make_rows(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, list[int]]]:
    """Rows of random tokens of different lengths, the first third of each without labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, longest + 1, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        start = max(1, length // 3)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def warm_optimizer(model: nn.Module, steps: int = 4, **settings) -> torch.optim.AdamW:
    """AdamW after a few real steps on random text; norms and biases without weight decay."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.05, **settings}
    decay = settings.pop("weight_decay")
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0, "eps": 1e-7},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], **settings)
    for row in make_rows(steps, seed=99):
        plain_loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def plain_loss(model: nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    """Mean token loss of one unpadded row by the model's ordinary forward, scalar."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=ids).logits[0, :-1]
    return F.cross_entropy(logits, labels[1:], ignore_index=-100)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), grads, strict=True)
    }


def slow_deltas(model: nn.Module, optimizer: torch.optim.Optimizer, row: dict) -> dict[str, torch.Tensor]:
    """Δ(g) of one row: a single-example backward pass and Eq. 1 in plain torch."""
    state = AdamWState.from_optimizer(model, optimizer)
    named = dict(model.named_parameters())
    return {
        name: reference.delta(grad, state[name].exp_avg, state[name].exp_avg_sq, named[name].detach(), state[name].step)
        for name, grad in gradients(model, plain_loss(model, row)).items()
    }


def clip_loop(monkeypatch, model: nn.Module, candidates: list[dict]) -> float:
    """From here on `slow_deltas` clips at the norm that it returns, which more than half of the candidates exceed."""
    norms = sorted(_global_norm(gradients(model, plain_loss(model, row))) for row in candidates)
    limit = sum(norms[1:3]) / 2
    plain_gradients, plain_deltas = gradients, slow_deltas

    def clipped(model, loss):
        grads = plain_gradients(model, loss)
        return {key: grad * min(1.0, limit / _global_norm(grads)) for key, grad in grads.items()}

    def clipped_deltas(model, optimizer, row):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "gradients", clipped)
            return plain_deltas(model, optimizer, row)

    monkeypatch.setattr(sys.modules[__name__], "slow_deltas", clipped_deltas)
    return limit


def _global_norm(grads: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([grad.norm() for grad in grads.values()]).norm())


def reference_loss(model: nn.Module, rows: list[dict]) -> torch.Tensor:
    return torch.stack([plain_loss(model, row) for row in rows]).mean()


def slow_influence(model, optimizer, candidates, references, method, pilot=None) -> list[float]:
    """Influence of every candidate by the definition, one example and one backward pass at a time."""
    steps = [slow_deltas(model, optimizer, row) for row in candidates]
    before = float(reference_loss(model, references).detach())
    if method == "exact":
        return [before - float(reference_loss(moved(model, step), references).detach()) for step in steps]
    if method == "first_order":
        q = gradients(model, reference_loss(model, references))
        return [-sum(float((q[name] * step[name]).sum()) for name in q) for step in steps]
    anchor = {name: sum(steps[i][name] for i in pilot) / len(pilot) for name in steps[0]}
    at_anchor = moved(model, anchor)
    loss = reference_loss(at_anchor, references)
    q = gradients(at_anchor, loss)
    return [
        before - float(loss.detach()) - sum(float((q[name] * (step[name] - anchor[name])).sum()) for name in q)
        for step in steps
    ]


def moved(model: nn.Module, step: dict[str, torch.Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in step:
                parameter.add_(step[name])
    return other


WORDS = [
    "what",
    "is",
    "the",
    "capital",
    "of",
    "france",
    "paris",
    "name",
    "a",
    "colour",
    "blue",
    "red",
    "add",
    "two",
    "and",
    "three",
    "five",
    "say",
    "hello",
    "world",
]
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tokenizer():
    """A word-level tokenizer with ChatML's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "system", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_text_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Instruction and response rows over the tokenizer's words."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [{"instruction": words(2, 6), "response": words(1, 8)} for _ in range(count)]


def make_student(directory):
    """Save a tiny student warmed up for two real steps; returns the checkpoint directory."""
    from montessori.encoding import encode_rows
    from montessori.warmup import warmup

    model = make_model("llama_tied", torch.float32)
    tokenizer = make_tokenizer()
    examples = encode_rows(make_text_rows(8, seed=5), tokenizer, max_length=64).examples
    return warmup(
        model, tokenizer, examples, directory, learning_rate=1e-3, batch_size=4,
        per_device_train_batch_size=4, max_steps=2, weight_decay=0.1, progress=False,
    )  # fmt: skip


def options(student, files, /, **changes):
    """Words of the command line that scores these files."""
    chosen = {"student": student, "optimizer": student, **files, **changes}
    return [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", value)]
