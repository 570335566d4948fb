"""LeRobotDataset v3: tables as parquet, cameras as MP4 (or as images inside the tables).

<root>/meta/info.json              features, fps, path templates
<root>/meta/tasks.parquet          (or tasks.jsonl) instruction of each task_index
<root>/meta/episodes/chunk-*/*     per episode: rows, and for each camera the file and the time it begins
<root>/data/chunk-*/file-*.parquet the numbers of many episodes
<root>/videos/<camera>/chunk-*/*   the frames of many episodes
<root>/meta/robovlms.json          ours, optional: what the numbers mean, fields of `registry.entry.Entry`

    meta.py  splits.py  what the dataset says about itself     meaning.py  what its numbers and cameras are
    tables.py  video.py  rows, images and frames               pairing.py  spans.py  faults.py  what belongs together
    dataset.py  all of it as a `data.base.Dataset`              stored.py  the same, whatever the numbers mean

Needs the extra `lerobot` (pyarrow, PyAV). Video is decoded from the key frame before, and images in tables are read by
row group, so random reads cost a multiple of JPEG's: convert once with `python -m experiments.convert_data` for long
trainings.
"""

from robovlms_jax.data.lerobot.dataset import LeRobotDataset, Split, open_dataset
from robovlms_jax.data.lerobot.meaning import CONVENTIONS
from robovlms_jax.data.lerobot.stored import StoredDataset

__all__ = ["CONVENTIONS", "LeRobotDataset", "Split", "StoredDataset", "open_dataset"]
