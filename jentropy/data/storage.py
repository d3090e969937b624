"""Preparing TFDS datasets as array_record and reading them into NumPy arrays, without TensorFlow."""

import contextlib
import functools
import io
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

Arrays = dict[str, np.ndarray]


def default_data_dir() -> pathlib.Path:
    """Where datasets are kept: `$JENTROPY_DATA`, or `~/.cache/jentropy/data`."""
    return pathlib.Path(os.environ.get("JENTROPY_DATA") or "~/.cache/jentropy/data").expanduser()


def prepare(
    builder: type[tfds.core.GeneratorBasedBuilder], config: str, data_dir: str | os.PathLike | None = None
) -> tfds.core.DatasetBuilder:
    """Writes one config of a dataset into `data_dir` unless it is there, and returns a builder that reads it.

    Atomic: TFDS writes into a temporary folder and renames it, so several processes may call this at once.

    Args:
      builder: the TFDS builder class.
      config: name of one of its builder configs.
      data_dir: folder of all datasets; None for `default_data_dir()`.

    Raises:
      ValueError: the builder has no such config.
      OSError: the folder cannot be written; names it.
    """
    if config not in builder.builder_configs:
        raise ValueError(f"config must be one of {sorted(builder.builder_configs)}, got {config!r}")
    data_dir = default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    folder = data_dir / builder.name / config / str(builder.VERSION)
    try:
        if not (folder / "dataset_info.json").exists():
            _write(builder, config, data_dir)
    except OSError as error:
        if not (folder / "dataset_info.json").exists():  # else another process was faster
            raise OSError(
                f"cannot write the dataset {builder.name}/{config} to {data_dir} ({error}); "
                "name a writable folder with data_dir or the environment variable JENTROPY_DATA"
            ) from error
    return tfds.builder_from_directory(folder)


def _write(builder: type[tfds.core.GeneratorBasedBuilder], config: str, data_dir: pathlib.Path) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download that does not happen
        builder(config=config, data_dir=data_dir, file_format="array_record").download_and_prepare(
            download_config=offline
        )


def split_arrays(
    builder: type[tfds.core.GeneratorBasedBuilder], config: str, split: str, data_dir: str | os.PathLike | None = None
) -> Arrays:
    """One split as read-only arrays `[N, ...]` by feature name, prepared if need be and read once per process.

    Only for fixed-shape integer features. Raises as `prepare`; ValueError if there is no such split.
    """
    data_dir = default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    return dict(_read(builder, config, split, data_dir.absolute()))


@functools.lru_cache(maxsize=128)
def _read(
    builder: type[tfds.core.GeneratorBasedBuilder], config: str, split: str, data_dir: pathlib.Path
) -> tuple[tuple[str, np.ndarray], ...]:
    reader = prepare(builder, config, data_dir)
    if split not in reader.info.splits:
        raise ValueError(f"split must be one of {sorted(reader.info.splits)}, got {split!r}")
    # Parsing the records here is five times faster than TFDS's feature-wise decoding of each record.
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = reader.as_data_source(split, deserialize_method=raw)  # pyright: ignore[reportCallIssue] (decorated)
    records = source.__getitems__(range(len(source)))
    examples = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    features = reader.info.features
    assert features is not None
    arrays = []
    for name, feature in features.items():
        values = [value for example in examples for value in example[name].int64_list.value]
        array = np.asarray(values, feature.np_dtype).reshape(len(examples), *feature.shape)
        array.flags.writeable = False
        arrays.append((name, array))
    return tuple(arrays)
