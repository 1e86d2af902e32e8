import sys
from pathlib import Path
from typing import Any

import pytest
import tuning_models as models


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert, bert16 (bfloat16), llama, tied (a llama whose head is its embeddings), train.csv, text.txt."""
    import torch

    folder = tmp_path_factory.mktemp("tuning")
    models.bert(folder / "bert")
    models.bert(folder / "bert16", torch.bfloat16)
    models.llama(folder / "llama")
    models.llama(folder / "tied", tie_word_embeddings=True)
    models.csv(folder / "train.csv")
    models.text(folder / "text.txt")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The base of the digits rig, as the lab's tests have it."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))
    from lab_rig import build_rig

    return load_file(build_rig(tmp_path_factory.mktemp("digits") / "rig") / "base" / "model.safetensors")
