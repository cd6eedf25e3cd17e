"""Converting a checkpoint: shard by shard, layer by layer, every file under a temporary name first, resumable.

Order of what reaches its final name: finished layers (in `.lutgemm-work`), each shard when all its layers are there,
then the small files, the reports, `config.json`, and the index last. A folder that loads is therefore complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import CheckpointError
from ..formats import layout_from_dict
from ..integrations.quantization_config import build
from .atomic import atomic_writer, is_partial, sync_folder, write_error, write_file
from .card import model_card
from .json_file import INDEX_LIMIT, dump_json, read_json
from .plan import Config, LayerPlan, Options, Plan, check_device, largest_layout, make_plan
from .reader import CONFIG_NAME, INDEX_NAME, REPORT_NAME, STATE_NAME, CheckpointFolder, open_source
from .records import (
    LayerResult,
    copied_output,
    piece_outputs,
    piece_path,
    quantize_layer,
    read_piece,
    write_piece,
)
from .report import build_report, report_markdown
from .safetensors_file import SafetensorsFile, write_safetensors
from .small_files import copy_small_files, small_files, too_large_files
from .state import WORK_NAME, FinishedShard, State, fingerprint, is_whole, locked, open_destination

LayerCallback = Callable[[LayerResult], None]


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    config: Config,
    *,
    modules: Sequence[tuple[str, Mapping[str, Any]]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lm_head: bool = False,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
    on_layer: LayerCallback | None = None,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Quantize the linear layers of the checkpoint folder `src` into the new folder `dst`; returns the report.

    config: of every layer; `modules` overrides it as (regex, fields) pairs. include, exclude: regexes on module names.
    lm_head: quantize the output layer too. resume: go on with an interrupted conversion of the same settings.
    on_layer: called with every layer's result. base_model: named in the model card, the folder's name when left out.
    Raises `CheckpointError` or `ArgumentError`; what is under a final name then is whole, and `resume` can go on.
    """
    options = Options(config, tuple(modules), tuple(include), tuple(exclude), lm_head, check_device(device))
    source, target = open_source(src), Path(dst)
    mark = fingerprint(source, options)
    if resume and (report := _finished_report(target, mark)):
        _check_files_are_whole(source, target, report)
        return report
    plan = make_plan(source, options)
    check_space(source, plan, target)
    state = open_destination(target, source, options, mark, resume)
    with locked(target):
        for leftover in [*target.iterdir(), *(target / WORK_NAME).iterdir()]:
            if is_partial(leftover):
                leftover.unlink(missing_ok=True)
        total = sum(source.entry(name).nbytes for name in source.where)
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="quantize") as bar:
            conversion = Conversion(source, target, plan, options, state, bar, on_layer)
            for shard in source.shards:
                conversion.shard(shard)
        return conversion.finish(base_model or source.folder.resolve().name, mark)


def _finished_report(dst: Path, mark: str) -> dict[str, Any] | None:
    """The report in `dst` when a conversion of the same source and settings has ended there already."""
    if (dst / STATE_NAME).exists() or not (dst / REPORT_NAME).exists():
        return None
    report = read_json(dst / REPORT_NAME, INDEX_LIMIT, "delete the folder and start again without --resume")
    return report if report.get("fingerprint") == mark else None


def _check_files_are_whole(source: CheckpointFolder, dst: Path, report: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` when a file of a finished conversion is gone, or has another size than it had."""
    remedy = f"delete {dst} and start again without --resume"
    files = report.get("files")
    if not isinstance(files, dict) or files.keys() != source.shards.keys():
        raise CheckpointError(f"{dst / REPORT_NAME}: its list of files is not that of SRC; {remedy}")
    expected: dict[str, int | None] = {**files, CONFIG_NAME: None} | ({INDEX_NAME: None} if source.sharded else {})
    for name, size in expected.items():
        path = dst / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the conversion had ended; {remedy}")
        if size is not None and path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size} bytes, {REPORT_NAME} says {size!r}; it is damaged, {remedy}"
            )


def output_bytes(source: CheckpointFolder, plan: Plan, shard: str) -> tuple[int, int]:
    """(bytes of the records, bytes of copied tensors) of one shard of the result, at most."""
    layers = {layer.tensor: layer for layer in plan.layers if layer.shard == shard}
    records = sum(largest_layout(x.config, x.out_features, x.in_features).nbytes for x in layers.values())
    copied = sum(entry.nbytes for name, entry in source.shards[shard].entries.items() if name not in layers)
    return records, copied


def check_space(source: CheckpointFolder, plan: Plan, dst: Path) -> None:
    """Raise `CheckpointError` when the disk cannot hold the result and one shard's records beside it."""
    sizes = [output_bytes(source, plan, shard) for shard in source.shards]
    needed = sum(records + copied for records, copied in sizes) + max(records for records, _ in sizes)
    needed += sum(path.stat().st_size for path, _ in small_files(source.folder)) + (1 << 20)
    folder = next(parent for parent in (dst.absolute(), *dst.absolute().parents) if parent.is_dir())
    if dst.is_dir():
        work = [*dst.iterdir(), *(dst / WORK_NAME).glob("*")]
        needed -= sum(path.stat().st_size for path in work if path.is_file() and not is_partial(path))
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:
        raise CheckpointError(
            f"{dst}: needs up to {needed / 1e6:.0f} MB, but the disk has {usage.free / 1e6:.0f} MB free; "
            "free some space or choose another disk"
        )


class Conversion:
    """One run of the converter over the shards of `source`."""

    def __init__(
        self,
        source: CheckpointFolder,
        dst: Path,
        plan: Plan,
        options: Options,
        state: State,
        bar: Any,
        on_layer: LayerCallback | None,
    ) -> None:
        self.source, self.dst, self.plan, self.options, self.state = source, dst, plan, options, state
        self.bar, self.on_layer = bar, on_layer
        self.work = dst / WORK_NAME

    def shard(self, name: str) -> None:
        """Bring one shard under its final name, unless it is there already."""
        layers = [layer for layer in self.plan.layers if layer.shard == name]
        finished = self.state.shards.get(name)
        if finished is not None and self._is_finished(name, finished, layers):
            self.bar.update(sum(entry.nbytes for entry in self.source.shards[name].entries.values()))
        else:
            results = [self._layer(layer) for layer in layers]
            size, sha256 = self._assemble(name, layers)
            self.state.shards[name] = FinishedShard(size, sha256, results)
            self.state.save(self.dst)
        for layer in layers:
            piece_path(self.work, layer).unlink(missing_ok=True)

    def _is_finished(self, name: str, finished: FinishedShard, layers: Sequence[LayerPlan]) -> bool:
        """Whether what the state says of a shard is what is planned, and is on disk. If not, the shard is made anew."""
        path = self.dst / name
        if len(finished.layers) != len(layers) or not is_whole(path, finished):
            return False
        pairs = list(zip(finished.layers, layers, strict=True))
        file = SafetensorsFile(path)
        return all(result.is_of(layer) and result.is_in(file) for result, layer in pairs)

    def _layer(self, layer: LayerPlan) -> LayerResult:
        path = piece_path(self.work, layer)
        self.bar.set_postfix_str(layer.module, refresh=False)
        result = read_piece(path, layer)
        if result is None:
            result, record = quantize_layer(self.source, layer, self.options.device)
            write_piece(path, result, record)
        self.bar.update(self.source.entry(layer.tensor).nbytes)
        if self.on_layer is not None:
            self.on_layer(result)
        return result

    def _assemble(self, name: str, layers: Sequence[LayerPlan]) -> tuple[int, str]:
        """Write the shard: records in place of the weights they came from, everything else as it is."""
        file = self.source.shards[name]
        by_tensor = {layer.tensor: layer for layer in layers}
        outputs = []
        for tensor in sorted(file.entries):
            if layer := by_tensor.get(tensor):
                outputs += piece_outputs(piece_path(self.work, layer), layer.module)
            else:
                outputs.append(copied_output(file, tensor, self.plan.renamed.get(tensor, tensor)))
        with atomic_writer(self.dst / name) as handle:
            written = write_safetensors(handle, outputs, {"format": "pt"})
        self.bar.update(sum(entry.nbytes for tensor, entry in file.entries.items() if tensor not in by_tensor))
        return written

    def finish(self, base_model: str, mark: str) -> dict[str, Any]:
        """Everything but the shards; `config.json` and the index last, then the state goes."""
        by_module = {layer.module: layer for shard in self.state.shards.values() for layer in shard.layers}
        results = [by_module[layer.module] for layer in self.plan.layers]
        copy_small_files(self.source.folder, self.dst)
        files = _written(self.dst, self.source)
        sizes = {name: file.size for name, file in files.items()}
        too_large = too_large_files(self.source.folder)
        report = build_report(self.source, self.plan, self.options, results, sizes, too_large, mark)
        write_file(self.dst / REPORT_NAME, dump_json(report))
        write_file(self.dst / "report.md", report_markdown(report).encode())
        write_file(self.dst / "README.md", model_card(report, base_model).encode())
        write_file(
            self.dst / CONFIG_NAME, dump_json(self.source.config | {"quantization_config": self._config(results)})
        )
        if self.source.sharded:
            weight_map = dict(sorted((tensor, name) for name, file in files.items() for tensor in file.entries))
            total = sum(entry.nbytes for file in files.values() for entry in file.entries.values())
            write_file(self.dst / INDEX_NAME, dump_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
        try:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.work)
            (self.dst / STATE_NAME).unlink(missing_ok=True)
            sync_folder(self.dst)
        except OSError as error:
            raise write_error(self.dst / STATE_NAME, error) from None
        return report

    def _config(self, results: Sequence[LayerResult]) -> dict[str, Any]:
        layouts = {result.module: layout_from_dict(result.layout, *result.shape) for result in results}
        return build(self.options.config, layouts)


def _written(dst: Path, source: CheckpointFolder) -> dict[str, SafetensorsFile]:
    """The shards of the result, opened again."""
    return {name: SafetensorsFile(dst / name) for name in source.shards}
