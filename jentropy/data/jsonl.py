"""A user's own prompts: JSONL files through one TFDS builder.

A line is an object with `prompt` (text), `answer` (any JSON value) and whatever else the graders want; an optional
`response` (text) makes it a demonstration too. Files of another kind hold pairs: `prompt`, and two different responses
to it, `chosen` the better and `rejected` the worse one. A path is one file or a directory of `*.jsonl`; each file is a
*part*, named by its stem, that mixtures weigh and reports tell apart.

A prompt is held out if its sha256, read as a fraction, is below `heldout_fraction`: a prompt is on the same side in
every file, of either kind, however often it occurs and whatever else the data holds. Pairs of held-out prompts are
left out. Order is that of files by name and lines.

The dataset's folder is named by the checksums of the sources, so changed data are prepared anew, and it holds the
checksums of its own files, which are verified before use.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from jentropy import base
from jentropy.data import storage

_MAX_LINE_BYTES = 2**20
_RESERVED = ("prompts", "completions", "prompt_length", "part")
_MANIFEST = "checksums.json"

PROMPTS, PAIRS = "prompts", "pairs"
_REQUIRED = {PROMPTS: ("prompt", "answer"), PAIRS: ("prompt", "chosen", "rejected")}
_TEXTS = {PROMPTS: ("prompt", "response"), PAIRS: ("prompt", "chosen", "rejected")}
_PREFIXES = {PROMPTS: ("train", "heldout"), PAIRS: ("train",)}


class CorruptDataError(ValueError):
    """Data that are not what they were: a checksum that does not match, or records that cannot be read.

    Attributes:
      exit_code: of a process that ends because of it.
    """

    exit_code = 65


def sha256_of(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_files(path: str | os.PathLike) -> tuple[pathlib.Path, ...]:
    """The JSONL file at `path`, or those of the directory at `path`, by name.

    Raises:
      FileNotFoundError: nothing there, or a directory without `*.jsonl`.
    """
    path = pathlib.Path(path).expanduser().resolve()
    if path.is_file():
        return (path,)
    files = tuple(sorted(path.glob("*.jsonl")))
    if not files:
        raise FileNotFoundError(f"no JSONL data at {path}: expected a file, or a directory of *.jsonl")
    return files


def is_heldout(prompt: str, fraction: float) -> bool:
    """Whether a prompt is held out: sha256(prompt) / 2²⁵⁶ < fraction, in 64 bits."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64 < fraction


def read_rows(path: pathlib.Path, kind: str = PROMPTS) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, in order; blank lines are left out.

    Args:
      path: of the file.
      kind: `PROMPTS` or `PAIRS`, which says what fields a row needs.

    Raises:
      ValueError: a line is no JSON object with the fields it needs, or longer than 1 MiB; names file and line.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if not line.strip():
                continue
            try:
                yield _parse(line, kind)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _parse(line: bytes, kind: str) -> dict[str, Any]:
    if len(line) > _MAX_LINE_BYTES:
        raise ValueError(f"longer than {_MAX_LINE_BYTES} bytes")
    row = json.loads(line.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    for name in _REQUIRED[kind]:
        if name not in row:
            raise ValueError(f"no {name!r}; it has {sorted(row)}")
    for name in _TEXTS[kind]:
        text = row.get(name, "-")
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name!r} must be a text that is not empty, got {text!r}")
    if kind == PAIRS and row["chosen"] == row["rejected"]:
        raise ValueError("'chosen' and 'rejected' are the same text: the pair has no loser")
    for name in _RESERVED:
        if name in row:
            raise ValueError(
                f"a field must not be called {name!r}: that is an argument of graders or a feature of ours"
            )
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return row


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a field occurs twice in {[name for name, _ in pairs]}")
    return found


@dataclasses.dataclass(eq=False)
class JsonlConfig(tfds.core.BuilderConfig):
    """Which files a dataset is made of.

    Attributes:
      files: in order.
      heldout_fraction: share of held-out prompts.
      kind: `PROMPTS` or `PAIRS`.
    """

    files: tuple[pathlib.Path, ...] = ()
    heldout_fraction: float = 0.1
    kind: str = PROMPTS


class Jsonl(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of JSONL files: splits `train_<i>` and `heldout_<i>` of file i, records in the order of lines.

    Pairs have no held-out splits.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing is downloaded, so TFDS need not look for a checksum file beside the source

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts, answers and further fields of JSONL files.",
            features=tfds.features.FeaturesDict({"row": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        assert isinstance(self.builder_config, JsonlConfig)
        indices = range(len(self.builder_config.files))
        return {
            f"{prefix}_{i}": self._generate_examples(i, heldout=prefix == "heldout")
            for i in indices
            for prefix in _PREFIXES[self.builder_config.kind]
        }

    def _generate_examples(self, index: int, *, heldout: bool) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        assert isinstance(config, JsonlConfig)
        for i, row in enumerate(read_rows(config.files[index], config.kind)):
            if is_heldout(row["prompt"], config.heldout_fraction) == heldout:
                yield i, {"row": json.dumps(row, ensure_ascii=False)}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset; hashable.

    Attributes:
      folder: where its records are.
      sources: (file name, sha256) of the JSONL files it was made of, in order.
      kind: `PROMPTS` or `PAIRS`.
    """

    folder: str
    sources: tuple[tuple[str, str], ...]
    kind: str = PROMPTS

    @property
    def parts(self) -> tuple[str, ...]:
        """Stems of the files, in order."""
        return tuple(pathlib.PurePath(name).stem for name, _ in self.sources)

    @property
    def splits(self) -> tuple[tuple[str, str], ...]:
        """(prefix, part) of all splits."""
        return tuple((prefix, part) for part in self.parts for prefix in _PREFIXES[self.kind])


def prepare(
    path: str | os.PathLike, *, heldout_fraction: float = 0.1, data_dir: str | os.PathLike | None = None,
    kind: str = PROMPTS,
) -> Prepared:  # fmt: skip
    """Writes the dataset of one or several JSONL files unless it is there, and verifies its checksums.

    Atomic: several processes may call this at once.

    Args:
      path: a file, or a directory of `*.jsonl`.
      heldout_fraction: share of held-out prompts, in (0, 1).
      data_dir: folder of all datasets; None for `storage.default_data_dir()`.
      kind: `PROMPTS` or `PAIRS`.

    Raises:
      CorruptDataError: the prepared dataset is not what was written.
      ValueError: a bad line, or a file without a training or, for prompts, without a held-out prompt.
      OSError: a source cannot be read, or the folder cannot be written; names it.
    """
    base.require(0 < heldout_fraction < 1, "heldout_fraction", heldout_fraction, "in (0, 1)")
    files = source_files(path)
    sources = tuple((file.name, sha256_of(file)) for file in files)
    made_of = [sources, heldout_fraction, *([] if kind == PROMPTS else [kind])]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    data_dir = storage.default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    folder = data_dir.absolute() / Jsonl.name / name / str(Jsonl.VERSION)
    if not folder.exists():
        for file in files:
            _check_split(file, heldout_fraction, kind)
        try:
            _write(JsonlConfig(name=name, files=files, heldout_fraction=heldout_fraction, kind=kind), sources, folder)
        except OSError as error:
            raise OSError(
                f"cannot write the dataset of {path} to {folder} ({error}); "
                "name a writable folder with data_dir or the environment variable JENTROPY_DATA"
            ) from error
    verify(folder)
    return Prepared(str(folder), sources, kind)


def _check_split(file: pathlib.Path, fraction: float, kind: str) -> None:
    sides = [is_heldout(row["prompt"], fraction) for row in read_rows(file, kind)]
    counts = {"training": sides.count(False), "held-out": sides.count(True)}
    for name, count in list(counts.items())[: len(_PREFIXES[kind])]:
        if not count:
            raise ValueError(f"{file} has no {name} prompt among {len(sides)} at heldout_fraction = {fraction}")


def _write(config: JsonlConfig, sources: tuple[tuple[str, str], ...], folder: pathlib.Path) -> None:
    """Writes the dataset beside its place, with its checksums, and moves it there; a faster process wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as temporary:
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()), _quiet_absl():
            builder = Jsonl(config=config, data_dir=temporary, file_format="array_record")
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        made = pathlib.Path(temporary) / Jsonl.name / config.name / folder.name
        files = {file.name: sha256_of(file) for file in sorted(made.iterdir())}
        manifest = {"sources": dict(sources), "files": files}
        (made / _MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1), encoding="utf-8")
        if dict(sources) != {file.name: sha256_of(file) for file in config.files}:
            raise CorruptDataError(f"{config.files[0].parent}: a file changed while the dataset was made of it")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / _MANIFEST).exists():
                raise
            shutil.rmtree(made)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """TFDS warns of a config that its class does not list, which is the point of this one."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def verify(folder: str | os.PathLike) -> None:
    """Compares every file of a prepared dataset with its checksum.

    Raises:
      CorruptDataError: a file is missing, cannot be read or has changed; names it.
    """
    folder = pathlib.Path(folder)
    advice = f"delete {folder} to have it made anew from its sources"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        expected = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptDataError(f"{folder / _MANIFEST} cannot be read ({error}); {advice}") from error
    if _digest(manifest) != expected:
        raise CorruptDataError(f"{folder / _MANIFEST} has changed; {advice}")
    for name, expected in manifest["files"].items():
        found = sha256_of(folder / name) if (folder / name).is_file() else None
        if found != expected:
            what = "is missing" if found is None else f"has sha256 {found}, not {expected}"
            raise CorruptDataError(f"{folder / name} {what}; {advice}")


@functools.lru_cache(maxsize=128)
def _rows(folder: str, split: str) -> tuple[dict[str, Any], ...]:
    """The objects of a split, in order."""
    reader = tfds.builder_from_directory(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = reader.as_data_source(split, deserialize_method=raw)  # pyright: ignore[reportCallIssue] (decorated)
    records = source.__getitems__(range(len(source)))
    features = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    return tuple(json.loads(feature["row"].bytes_list.value[0]) for feature in features)


def rows(data: Prepared, prefix: str, part: str) -> tuple[dict[str, Any], ...]:
    """The objects of one part, those of "train" or of "heldout", in order; not to be changed."""
    return _rows(data.folder, f"{prefix}_{data.parts.index(part)}")
