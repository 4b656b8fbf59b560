"""One answer to what a path is, wherever it is asked."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from fedmerge.common.sources import SourceKind, kind_of
from fedmerge.common.taskvector import Dense, TaskVector
from fedmerge.common.vectorfile import save


def test_a_folder_with_whole_weights_is_a_checkpoint_even_beside_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert kind_of(tmp_path) is SourceKind.ADAPTER
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert kind_of(tmp_path) is SourceKind.CHECKPOINT


def test_a_file_is_known_by_its_header_not_its_name(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "vector.safetensors")
    save(TaskVector.of({"weight": Dense(torch.ones(2, 2))}), tmp_path / "model.safetensors")
    assert kind_of(tmp_path / "vector.safetensors") is SourceKind.CHECKPOINT
    assert kind_of(tmp_path / "model.safetensors") is SourceKind.TASK_VECTOR
