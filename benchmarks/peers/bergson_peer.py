"""bergson: per-example gradients scored against a mean query, raw or divided by Adam's frozen second moment.

Its base model is without the vocabulary head, and its keys are relative to it. The query stays raw: the step on a
candidate is what the optimizer scales, not the reference gradient.
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from bergson import GradientProcessor, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
from bergson.collector.collector import CollectorComputer
from bergson.gradients import AdamNormalizer
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset
from torch import Tensor

from benchmarks.peers.task import Task
from montessori.batching import Example


class _Bergson:
    over_references = False
    same_units = False

    def __init__(self, task: Task, normalizers: dict[str, AdamNormalizer]) -> None:
        self.task = task
        self.prefix = f"{task.model.base_model_prefix}."
        self.layers = [name.removeprefix(self.prefix) for name in task.block_linears]
        self.covered = {f"{name}.weight" for name in task.block_linears}
        # As its own workers do: no weight gradient but that of the embedding, through which dY flows.
        task.model.requires_grad_(False)
        task.model.get_input_embeddings().requires_grad_(True)
        self.normalizers = {name.removeprefix(self.prefix): value for name, value in normalizers.items()}
        self.directory = tempfile.TemporaryDirectory()
        # Its default loss is a sum over tokens.
        self.config = IndexConfig(run_path=self.directory.name, loss_reduction="mean")
        self.config.partial_run_path.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        self.query = self._collect(
            self.task.references, GradientProcessor(), preprocess_cfg=PreprocessConfig(aggregation="mean")
        ).gradients

    def score(self) -> np.ndarray:
        writer = InMemorySequenceScoreWriter(len(self.task.candidates), 1)
        scorer = Scorer(self.query, self.layers, writer, torch.device("cpu"), torch.float32)
        self._collect(self.task.candidates, GradientProcessor(normalizers=self.normalizers), scorer=scorer)
        return writer.scores[:, 0].double().numpy()

    def _collect(self, examples: list[Example], processor: GradientProcessor, **settings) -> InMemoryCollector:
        rows = {"input_ids": [e.input_ids.tolist() for e in examples], "labels": [e.labels.tolist() for e in examples]}
        data = Dataset.from_dict(rows)
        collector = InMemoryCollector(
            model=self.task.model.base_model,
            data=data,
            cfg=self.config,
            processor=processor,
            target_modules=set(self.layers),
            **settings,
        )
        size = self.task.batch_size
        batches = [list(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)]
        computer = CollectorComputer(self.task.model, data, collector=collector, batches=batches, cfg=self.config)
        computer.run_with_collector_hooks()
        return collector


class FrozenAdam(_Bergson):
    def __init__(self, task: Task) -> None:
        normalizers = {layer: AdamNormalizer(self._second_moment(task, layer)) for layer in task.block_linears}
        super().__init__(task, normalizers)

    @staticmethod
    def _second_moment(task: Task, layer: str) -> Tensor:
        return task.state[f"{layer}.weight"].exp_avg_sq


class RawDot(_Bergson):
    def __init__(self, task: Task) -> None:
        super().__init__(task, {})
