"""One pass over a model's blocks: each is measured, solved, replaced, and kept in case the run is ended."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.allocation.entry import format_entry
from pbsp.calibration.experts import ExpertInputs
from pbsp.calibration.moments import collect_block_moments
from pbsp.calibration.states import States, copied
from pbsp.calibration.walk import Walk
from pbsp.config import Config
from pbsp.distributed import ALONE, Ranks
from pbsp.integrations.modules import empty_linear, packed_entry, replace_module
from pbsp.models.blocks import Block, linear_weight
from pbsp.models.shards import resident, shards_of
from pbsp.packed_linear import PackedLinear
from pbsp.planned import Planned
from pbsp.recovery.block import BlockRecovery, BlockTask, adapt_block, recover_block
from pbsp.report import BlockReport, LayerReport
from pbsp.resources import peak_rss_bytes
from pbsp.shared_unfinished import SharedUnfinished
from pbsp.solving import solve_linears
from pbsp.storage.checkpoint import LayerEntry
from pbsp.storage.layouts import Representation, is_packable
from pbsp.unfinished import FinishedBlock

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@dataclass
class BlockRun:
    """One pass over the blocks, and what it finds on the way."""

    model: PreTrainedModel
    blocks: list[Block]
    planned: Planned
    config: Config
    seconds: dict[str, float]
    tell: Progress
    plain_because: dict[str, str] = field(default_factory=dict)
    uncalibrated: dict[str, str] = field(default_factory=dict)
    packed: bool = True
    unfinished: SharedUnfinished | None = None
    ranks: Ranks = ALONE
    solved: dict[str, tuple[Representation, float]] = field(default_factory=dict)  # of shared weights
    recovered: list[BlockRecovery] = field(default_factory=list)
    originals: States = field(default_factory=list)  # the original's hidden states, where they are needed
    reports: list[BlockReport] = field(default_factory=list)
    forms: dict[str, LayerEntry] = field(default_factory=dict)  # of layers that have left memory

    def compress_blocks(self, tokens: Tensor) -> Iterator[LayerReport]:
        """Measure, solve and replace block after block, each behind its compressed predecessors.

        Args:
            tokens: the windows of all ranks.
        """
        own = self.ranks.part(len(tokens))
        with timed(self.seconds, "calibrate"):
            walk = Walk(self.model, self.blocks, tokens[own.start : own.stop])
        if self.config.recovers_blocks:
            self.originals = copied(self.model, walk.hidden)
        done = self._restored(walk)
        for layers in done:
            yield from layers
        for index in range(len(done), len(self.blocks)):
            self.tell("compress", index, len(self.blocks))
            yield from self._whole_block(walk, index, windows=len(tokens))
        self.tell("compress", len(self.blocks), len(self.blocks))

    def _whole_block(self, walk: Walk, index: int, *, windows: int) -> list[LayerReport]:
        """Compress a block and keep it; in memory it stays only with the rest of its model."""
        block = self.blocks[index]
        start = time.perf_counter()
        with resident(self.model, block.name):
            layers = self._compress_block(walk, index, windows=windows)
            self.reports.append(BlockReport(block.name, time.perf_counter() - start, peak_rss_bytes()))
            if self.unfinished:
                with timed(self.seconds, "keep"):
                    finished = self._finished(index, layers)
                    self.unfinished.keep(index, finished, walk.hidden, self.originals)
                if shards_of(self.model):
                    self._let_go(finished)
        return layers

    def _let_go(self, block: FinishedBlock) -> None:
        """Keep only the shapes of a finished block's packed layers, whose values are on disk."""
        for name, form in block.entries["forms"].items():
            entry = LayerEntry.from_dict(name, form)
            self.forms[name] = entry
            replace_module(self.model, name, empty_linear(self.model.get_submodule(name), entry.form))

    def _compress_block(self, walk: Walk, index: int, *, windows: int) -> list[LayerReport]:
        """The reports of one block's layers, which are replaced; the walk then stands behind it."""
        block = self.blocks[index]
        original_inputs = self.config.inputs == "original"
        linears = {
            name: module for name, module in block.linears().items() if name in self.planned.plan.entries
        }
        with timed(self.seconds, "calibrate"):
            for window, hidden in enumerate(self.originals):
                self.originals[window] = walk.replay(index, block.module, hidden)
        task = BlockTask(partial(walk.replay, index, block.module), walk.hidden, self.originals)
        with timed(self.seconds, "recover"):
            adapted = self._adapt(linears, task)
        with timed(self.seconds, "calibrate"):
            experts = ExpertInputs(block, windows=windows)
            with experts.watching():
                moments = collect_block_moments(
                    walk,
                    index,
                    block,
                    linears,
                    weighting=self.config.moment_weighting,
                    weights=self.planned.token_weights,
                    keep=original_inputs,
                    ranks=self.ranks,
                )
            stand_ins = experts.stand_ins(linears, moments.inputs, ranks=self.ranks)
            self.plain_because |= moments.plain_because
            self.uncalibrated |= stand_ins.reasons
        with timed(self.seconds, "solve"):
            moments.inputs.update(stand_ins.inputs)
            solved = solve_linears(linears, moments.inputs, self.planned.plan, self.config, ranks=self.ranks)
            shared = self.planned.plan.same_as.values()
            self.solved |= {name: result for name, result in solved.items() if name in shared}
            solved |= self.solved
            layers = [
                self._replace(name, module, *solved[self.planned.plan.same_as.get(name, name)])
                for name, module in linears.items()
            ]
        with timed(self.seconds, "recover"):
            self._recover(block, linears, task, adapted)
        with timed(self.seconds, "calibrate"):
            if not original_inputs:
                walk.run(index, block.module, keep=True)
        return layers

    def _adapt(self, linears: dict[str, nn.Module], task: BlockTask) -> tuple[float, float] | None:
        """Tune the uncompressed linears to their inputs, but for those that other blocks share.

        Only in float32: the steps are lost in the roundings of shorter types.
        """
        if not len(self.originals):
            return None
        shared = {*self.planned.plan.same_as, *self.planned.plan.same_as.values()}
        weights = {
            name: module.get_parameter("weight") for name, module in linears.items() if name not in shared
        }
        own = {name: weight for name, weight in weights.items() if weight.dtype == torch.float32}
        return adapt_block(own, task) if own else None

    def _recover(
        self,
        block: Block,
        linears: dict[str, nn.Module],
        task: BlockTask,
        adapted: tuple[float, float] | None,
    ) -> None:
        """Tune the compressed block, where that was asked for."""
        if not len(self.originals):
            return
        originals = {
            name.removeprefix(f"{block.name}."): linear_weight(module) for name, module in linears.items()
        }
        before, after, steps = recover_block(block.module, task, originals=originals)
        inherited, left = adapted or (None, None)
        self.recovered.append(BlockRecovery(block.name, inherited, left, before, after, steps))

    def _restored(self, walk: Walk) -> list[list[LayerReport]]:
        """Put back the blocks that an earlier run has finished; the walk then stands behind them."""
        if self.unfinished is None:
            return []
        reports = []
        count = self.unfinished.finished()
        for index in range(count):
            entries = self.unfinished.entries(index)
            reports.append([LayerReport(**values) for values in entries["layers"]])
            block = FinishedBlock({}, entries) if shards_of(self.model) else self.unfinished.block(index)
            if block.tensors:
                self._put_back(index, block, reports[-1])
            else:
                self._let_go(block)
            self.plain_because |= entries["plain_because"]
            self.uncalibrated |= entries["uncalibrated"]
            self.recovered += [BlockRecovery(**values) for values in entries["recovered"]]
            self.reports.append(BlockReport(**entries["report"]))
        if count:
            windows = len(walk.hidden)
            device = walk.hidden[0].device
            for place, state in enumerate(self.unfinished.hidden(count - 1)):
                states = walk.hidden if place < windows else self.originals
                states[place % windows] = state.to(device)
        return reports

    def _put_back(self, index: int, block: FinishedBlock, reports: list[LayerReport]) -> None:
        """A finished block's tensors, into the model."""
        for report in reports:
            form = LayerEntry.from_dict(report.name, block.entries["forms"][report.name]).form
            module = self.model.get_submodule(report.name)
            device = linear_weight(module).device
            tensors = {suffix: block.tensors[f"{report.name}.{suffix}"].to(device) for suffix in form.specs()}
            packed = form.packed(tensors)
            representation = packed.unpack()
            if report.name in self.planned.plan.same_as.values():
                self.solved[report.name] = representation, report.output_error
            self._replace(report.name, module, representation, report.output_error)
        for name, tensor in self._others(index).items():
            tensor.copy_(block.tensors[name])

    def _others(self, index: int) -> dict[str, Tensor]:
        """A block's stored tensors but for packed codes and scales: norms, biases, what stays as it is."""
        found: dict[str, Tensor] = {}
        for name, module in self.blocks[index].module.named_modules(prefix=self.blocks[index].name):
            buffers = module._buffers.keys() - module._non_persistent_buffers_set
            packed = module.form.specs() if isinstance(module, PackedLinear) else {}
            for leaf, tensor in {**module._parameters, **module._buffers}.items():
                stored = leaf in module._parameters or leaf in buffers
                if tensor is not None and stored and leaf not in packed:
                    found[f"{name}.{leaf}"] = tensor.detach()
        return found

    def _finished(self, index: int, layers: list[LayerReport]) -> FinishedBlock:
        """What `_restored` needs of a block."""
        found = {layer.name: self.model.get_submodule(layer.name) for layer in layers}
        modules = {name: module for name, module in found.items() if isinstance(module, PackedLinear)}
        assert len(modules) == len(found), "only packed layers can be kept"
        entries = {name: packed_entry(module) for name, module in modules.items()}
        return FinishedBlock(
            {
                f"{name}.{suffix}": tensor.cpu()
                for name, module in modules.items()
                for suffix, tensor in module.packed.tensors().items()
            }
            | {name: tensor.cpu().clone() for name, tensor in self._others(index).items()},
            {
                "layers": [asdict(layer) for layer in layers],
                "forms": {name: entry.to_dict() for name, entry in entries.items()},
                "plain_because": self.plain_because,
                "uncalibrated": self.uncalibrated,
                "recovered": [asdict(one) for one in self.recovered if one.name == self.blocks[index].name],
                "report": asdict(self.reports[-1]),
            },
        )

    def _replace(
        self, name: str, module: nn.Module, representation: Representation, error: float
    ) -> LayerReport:
        """Put the packed layer in the linear's place, or its values where no layout holds them."""
        if is_packable(representation):
            bias = module.bias if isinstance(module.bias, Tensor) else None
            layer = PackedLinear.of(representation, bias)
            replace_module(self.model, name, layer)
            return LayerReport.of(name, layer, error)
        self.packed = False
        linear_weight(module).copy_(representation.dense())
        pattern = format_entry(self.planned.plan.entries[name]) or "dense"
        return LayerReport.of_values(name, representation, pattern, error)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start
