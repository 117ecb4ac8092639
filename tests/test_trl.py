"""Conversations have the ids and labels of TRL's trainer where both are given its training template."""

import re
from pathlib import Path

import datasets
import pytest
from encoding_support import ASSISTANT, TURNS, USER, byte_level, encode, one
from transformers import LlamaConfig, LlamaForCausalLM

ROWS = [{"messages": TURNS}, {"messages": [USER, {**ASSISTANT, "content": "2 + 2 = **4**\n"}]}]


@pytest.mark.parametrize(
    ("name", "end"), [("qwen2_5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("llama3", "<|eot_id|>")]
)
def test_ids_and_labels_are_those_of_trl_with_its_training_template(name, end, tmp_path):
    trl = pytest.importorskip("trl")
    utils = pytest.importorskip("trl.chat_template_utils")
    file = Path(trl.__file__).parent / f"chat_templates/{name}.jinja"
    if not hasattr(utils, "get_training_chat_template") or not file.is_file():
        pytest.skip(f"this TRL has no training template of {name}")
    source = file.read_text()
    special = sorted({*re.findall(r"<\|\w+\|>", source), "<s>"})
    tokenizer = byte_level(*special, template=source, bos_token="<s>", eos_token=end, pad_token=end)
    training = utils.get_training_chat_template(tokenizer)

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "output_dir": str(tmp_path)}
    arguments, table = trl.SFTConfig(assistant_only_loss=True, **quiet), datasets.Dataset.from_list(ROWS)
    trained = trl.SFTTrainer(model, arguments, train_dataset=table, processing_class=tokenizer).train_dataset
    found = encode(ROWS, tokenizer, chat_template=training).examples
    assert [example.input_ids.tolist() for example in found] == list(trained["input_ids"])
    assert [example.labels.tolist() for example in found] == list(trained["labels"])

    if name == "qwen3":
        several, single = (one(row, tokenizer) for row in ROWS)
        assert several.num_tokens < len(trained[0]["input_ids"])
        assert single.input_ids.tolist() == trained[1]["input_ids"]
        assert trained[1]["labels"][-1] == tokenizer("\n")["input_ids"][0]
        assert single.labels.tolist() == [*trained[1]["labels"][:-1], -100]
