import shutil
from copy import deepcopy
from pathlib import Path

import pytest

from pso_utils.families.loading import ModelSource, load_pipeline
from pso_utils.families.sdxl import SDXL


@pytest.fixture(scope="session")
def loaded_pipeline(tiny_pipeline_dir):
    return load_pipeline(ModelSource(tiny_pipeline_dir))


@pytest.fixture
def pipeline(loaded_pipeline):
    """The pipeline as `load_pipeline` loads it; the test may change it."""
    return deepcopy(loaded_pipeline)


@pytest.fixture
def family(pipeline):
    return SDXL(pipeline)


@pytest.fixture
def pipeline_copy(tiny_pipeline_dir, tmp_path) -> Path:
    """A pipeline folder that the test may spoil."""
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "pipeline"))
