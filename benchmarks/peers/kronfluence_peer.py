"""Kronfluence with its identity strategy: the plain dot product of gradients, over the linear layers of the blocks."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as KronfluenceTask
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from benchmarks.peers.task import Task, batch_losses
from montessori.batching import Batch, Example, collate


class _ResponseLoss(KronfluenceTask):
    def __init__(self, task: Task) -> None:
        self.layers = list(task.block_linears)
        self.num_references = len(task.references)

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        return batch_losses(model, batch).sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        return batch_losses(model, batch).sum() / self.num_references

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers

    def get_attention_mask(self, batch: Batch) -> Tensor:
        return batch.attention_mask


class _Examples(torch.utils.data.Dataset):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class RawDot:
    over_references = True
    same_units = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.covered = {f"{name}.weight" for name in task.block_linears}
        kronfluence_task = _ResponseLoss(task)
        # Freezes the model in place and wraps its layers.
        model = prepare_model(task.model, kronfluence_task)
        self.directory = tempfile.TemporaryDirectory()
        self.analyzer = Analyzer(
            "peers", model, kronfluence_task, cpu=True, output_dir=self.directory.name, disable_tqdm=True
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))

    def prepare(self) -> None:
        self.analyzer.fit_all_factors(
            "identity",
            _Examples(self.task.candidates),
            per_device_batch_size=self.task.batch_size,
            factor_args=FactorArguments(strategy="identity"),
            overwrite_output_dir=True,
        )

    def score(self) -> np.ndarray:
        self.analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            query_dataset=_Examples(self.task.references),
            train_dataset=_Examples(self.task.candidates),
            per_device_query_batch_size=self.task.batch_size,
            per_device_train_batch_size=self.task.batch_size,
            score_args=ScoreArguments(aggregate_query_gradients=True),
            overwrite_output_dir=True,
        )
        return self.analyzer.load_pairwise_scores("scores")["all_modules"][0].double().numpy()
