"""The engine for many prompts on GPUs: vLLM offline, its memory given back while the program trains."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from montessori.errors import ModelError
from montessori.loop.engines import (
    BatchedEngine,
    EngineSettings,
    Request,
    Sample,
    Sampling,
    context_length,
    leaves_room,
    prompt_ids,
)
from montessori.models import checkpoint_name

# A call keeps the engine busy for this many rounds of its sequences; finished calls survive a kill.
_CALL_ROUNDS = 8
# Entries of a config that differ between checkpoints of one model.
_INCIDENTAL = ("_name_or_path", "dtype", "transformers_version", "use_cache")


class VllmEngine(BatchedEngine):
    """One `vllm.LLM` for the whole run.

    On GPUs `release` puts it to sleep (weights and cache are discarded) and `load` wakes it and reads the
    new weights; elsewhere, where vLLM cannot sleep, `release` ends it. A checkpoint of another architecture
    ends it as well.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ModelError("engine.name=vllm: vllm is not installed: pip install vllm")
        self.settings = settings
        self.tokenizer: Any = None
        self._llm: Any = None
        self._asleep = False
        self._limit = 0
        self._architecture: dict[str, Any] = {}

    def load(self, model: str | os.PathLike[str]) -> None:
        name = checkpoint_name(model)
        architecture = _architecture(name)
        if self._llm is not None and architecture != self._architecture:
            self._end()
        if self._llm is None:
            self._architecture = architecture
            self._start(name)
            return
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": name})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._asleep = False
        # It holds keys and values of the weights before.
        self._llm.reset_prefix_cache()

    def fits(self, prompt: str) -> bool:
        return leaves_room(self.tokenizer, prompt, self._limit)

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Long calls in the order given, in which siblings stand side by side and share their prompt's cache."""
        size = _CALL_ROUNDS * self.settings.batch_size
        return [list(requests[start : start + size]) for start in range(0, len(requests), size)]

    def generate(self, requests: Sequence[Request], sampling: Sampling, stop: Sequence[str] = ()) -> list[Sample]:
        from vllm import SamplingParams

        ids = prompt_ids(self.tokenizer, requests, self._limit)
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                presence_penalty=sampling.presence_penalty,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=min(sampling.max_new_tokens, self._limit - len(prompt)),
                seed=request.seed,
                stop=list(stop),
                include_stop_str_in_output=True,
            )
            for request, prompt in zip(requests, ids, strict=True)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in ids]
        outputs = [output.outputs[0] for output in self._llm.generate(inputs, parameters, use_tqdm=False)]
        return [
            Sample(
                output.text,
                len(output.token_ids),
                "stop" if output.finish_reason in (None, "stop") else "length",
                list(output.token_ids),
            )
            for output in outputs
        ]

    def release(self) -> None:
        if self._llm is None or self._asleep:
            return
        if torch.cuda.is_available():
            self._llm.sleep(level=2)
            self._asleep = True
            return
        self._end()

    def _end(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._asleep = None, False
        gc.collect()

    def _start(self, name: str) -> None:
        from transformers import AutoConfig
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        try:
            self._limit = context_length(AutoConfig.from_pretrained(name).get_text_config(), self.settings.max_length)
            self._llm = LLM(
                model=name,
                dtype=self.settings.dtype,
                max_model_len=self._limit,
                max_num_seqs=self.settings.batch_size,
                tensor_parallel_size=self.settings.tensor_parallel_size,
                gpu_memory_utilization=self.settings.gpu_memory_utilization,
                enable_prefix_caching=True,
                enable_sleep_mode=on_gpu,
                enforce_eager=not on_gpu,
                # A prompt read in parts takes back a draw, which vLLM's generators cannot do on a CPU.
                enable_chunked_prefill=on_gpu,
            )
        # vLLM raises what its workers raise, of any class.
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{name}: vLLM cannot serve it: {text}") from error
        self.tokenizer = self._llm.get_tokenizer()


def _architecture(name: str) -> dict[str, Any]:
    """The model's config without what differs between checkpoints of one model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name).to_dict()
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}
